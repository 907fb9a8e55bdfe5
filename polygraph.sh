#!/usr/bin/env bash
# Inspects and compares the exported graphs and their engines with NVIDIA's Polygraphy, on real photos.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./polygraph.sh COMMAND [OPTIONS] [-- POLYGRAPHY OPTIONS]

  inspect      inputs, outputs and MatMul ranks of the exported files
  compare      ONNX Runtime against TensorRT; where TensorRT cannot run, ONNX Runtime against PyTorch
  rewrite      the 4-D file against the 2-D file, in ONNX Runtime
  capability   which parts of the graph TensorRT can take                        (needs TensorRT and a GPU)
  precision    the fp32 engine against the fp16 engine                           (needs TensorRT and a GPU)
  layerwise    bisects to the first node whose output departs in TensorRT        (needs TensorRT and a GPU)

options:
  --onnx DIR       the exported files (default: onnx)
  --engines DIR    where engines are kept (default: engines)
  --weights W      what the files were exported from, for PyTorch (default: demo)
  --photo FILE     a photo to run on; may be repeated (default: image/temple.jpg)
  --atol X         the bound: largest absolute difference of an embedding's component (default: 1e-4; precision: 1e-2)

Everything printed goes to log/polygraph_COMMAND.log as well, after the command on the first line. The exit status is 0
when all is within the bound, 1 when it is not, 2 for bad input or where the machine lacks what the command needs.
TEXT
}

fail() { echo "error: $1" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
command=$1
shift
case "$command" in
  inspect | compare | rewrite | capability | precision | layerwise) ;;
  -h | --help | help) usage; exit 0 ;;
  *) fail "'$command' is no command: see ./polygraph.sh --help" ;;
esac

onnx="$root/onnx" engines="$root/engines" weights=demo photos=() atol=1e-4 given='' more=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --) shift; more=("$@"); break ;;
    --onnx | --engines | --weights | --photo | --atol)
      if [ $# -lt 2 ]; then fail "$1 needs a value"; fi
      case "$1" in
        --onnx) onnx=$2 ;;
        --engines) engines=$2 ;;
        --weights) weights=$2 ;;
        --photo) photos+=("$2") ;;
        --atol) atol=$2 given=1 ;;
      esac
      shift 2 ;;
    *) fail "unknown option $1: see ./polygraph.sh --help" ;;
  esac
done

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
"$python" -c 'import polygraphy' 2> /dev/null || fail "Polygraphy is not installed: run ./requirements.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[[ "$atol" =~ ^[0-9]+([.][0-9]+)?([eE][-+]?[0-9]+)?$ ]] || fail "--atol $atol is no number: give one such as 1e-4"
encoder="$onnx/lseg.onnx"
[ -f "$encoder" ] || fail "$encoder does not exist: run 'python lseg_export.py', or name its folder with --onnx"
if [ ${#photos[@]} -eq 0 ]; then photos=("$root/image/temple.jpg"); fi
for photo in "${photos[@]}"; do
  [ -f "$photo" ] || fail "$photo does not exist: check the name"
  case "$photo" in *:*) fail "$photo has a colon in its name, which separates photos here: rename it" ;; esac
done
LSEG_PHOTOS=$(IFS=:; echo "${photos[*]}")
export LSEG_PHOTOS

log="$root/log/polygraph_$command.log"
mkdir -p "$root/log" "$engines" 2> /dev/null || fail "$root/log or $engines cannot be written: choose another with --engines"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# TensorRT is needed as a library that runs, not as type stubs.
has_tensorrt() {
  "$python" -c 'import sys, tensorrt; from lseg.cuda import gpu_count; sys.exit(not (hasattr(tensorrt, "Builder") and gpu_count()))' 2> /dev/null
}
need_tensorrt() { has_tensorrt || fail "'$command' needs TensorRT and a GPU, and here is none: run it where there is one"; }

helper() { "$python" -m lseg.polygraph "$@"; }
polygraphy() { echo "+ polygraphy $*"; "$python" -c 'import sys; from polygraphy.tools import main; sys.exit(main())' "$@"; }
bound() { echo --atol "$atol" --rtol 0 --check-error-stat max; }
images="$root/lseg/polygraph.py:images"

inspect() {
  local files=("$onnx"/*.onnx)
  helper ranks "${files[@]}"
  local file
  for file in "${files[@]}"; do polygraphy inspect model "$file" "${more[@]}"; done
}

compare() {
  if has_tensorrt; then
    polygraphy run "$encoder" --onnxrt --trt --data-loader-script "$images" $(bound) \
      --save-engine "$engines/polygraph_compare.engine" "${more[@]}"
  else
    echo "no TensorRT and GPU here: ONNX Runtime against PyTorch"
    helper torch "$work/torch.json" --weights "$weights"
    polygraphy run "$encoder" --onnxrt --data-loader-script "$images" --load-outputs "$work/torch.json" $(bound) "${more[@]}"
  fi
}

rewrite() {
  helper graph "$encoder" "$work/4d.onnx" --matmul 4d
  helper graph "$encoder" "$work/2d.onnx" --matmul 2d
  helper ranks "$work/4d.onnx" "$work/2d.onnx"
  polygraphy run "$work/4d.onnx" --onnxrt --data-loader-script "$images" --save-outputs "$work/4d.json"
  polygraphy run "$work/2d.onnx" --onnxrt --data-loader-script "$images" --load-outputs "$work/4d.json" $(bound) "${more[@]}"
}

capability() {
  polygraphy inspect capability --with-partitioning "$encoder" -o "$root/log/polygraph_capability" "${more[@]}"
}

precision() {
  if [ -z "$given" ]; then atol=1e-2; fi
  helper graph "$encoder" "$work/fp32.onnx" --precision fp32
  helper graph "$encoder" "$work/fp16.onnx" --precision fp16
  polygraphy run "$work/fp32.onnx" --trt --strongly-typed --data-loader-script "$images" --save-outputs "$work/fp32.json"
  polygraphy run "$work/fp16.onnx" --trt --strongly-typed --data-loader-script "$images" --load-outputs "$work/fp32.json" \
    $(bound) "${more[@]}"
}

layerwise() {
  if compare; then
    echo "nothing departs: the whole graph is within the bound"
    return 0
  fi
  # One output at a time is marked and the inputs stay the photos: marking every tensor would change what is fused.
  polygraphy debug reduce "$encoder" -o "$root/log/polygraph_layerwise.onnx" --mode bisect --no-reduce-inputs \
    --model-input-shapes "image:[1,3,480,480]" "${more[@]}" \
    --check "$python" -c 'import sys; from polygraphy.tools import main; sys.exit(main())' run polygraphy_debug.onnx \
    --onnxrt --trt --data-loader-script "$images" $(bound)
  echo "the last node of $root/log/polygraph_layerwise.onnx is the first that departs"
  return 1
}

if [ "$command" != inspect ] && [ "$command" != capability ]; then helper photos; fi
case "$command" in capability | precision | layerwise) need_tensorrt ;; esac
named=()
for photo in "${photos[@]}"; do named+=(--photo "$photo"); done
{
  printf '%q ' ./polygraph.sh "$command" --onnx "$onnx" --engines "$engines" --weights "$weights" \
    "${named[@]}" --atol "$atol" "${more[@]}"
  echo
  "$command"
} 2>&1 | tee "$log"
