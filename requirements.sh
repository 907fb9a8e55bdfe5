#!/usr/bin/env bash
# Sets the machine up, then runs the command that follows in what it set up.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./requirements.sh [--dev | --locked] [--venv DIR] [COMMAND ...]

  ./requirements.sh                          set up only
  ./requirements.sh python enginerun.py      set up, then segment the bundled photo
  ./requirements.sh --dev pytest             set up with the test tools, then run the tests
  ./requirements.sh --locked                 set up with the very files that requirements.lock names

In NVIDIA's NGC PyTorch container the container's own Python is used and nothing that is there is replaced. Elsewhere
a virtual environment is made in .venv (or DIR): with CUDA builds and TensorRT where nvidia-smi answers, else for the
CPU. PYTHON names the interpreter to start from (default: python3). A second run finds everything and costs a second.

--locked installs what requirements.lock lists, wheels alone, each with the SHA-256 written there, and nothing else, into
a virtual environment of its own. TensorRT, pycuda and ONNX Runtime for GPUs are not in it: on a GPU PyTorch runs. In the
NGC container, whose own packages stay, it is refused.
TEXT
}

root=$(cd "$(dirname "$0")" && pwd)
venv="$root/.venv"
dev=0
locked=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dev) dev=1; shift ;;
    --locked) locked=1; shift ;;
    --venv)
      if [ $# -lt 2 ]; then echo "error: --venv needs a folder" >&2; exit 2; fi
      venv=$2; shift 2 ;;
    -*) echo "error: unknown option $1: see ./requirements.sh --help" >&2; exit 2 ;;
    *) break ;;
  esac
done
if [ "$dev$locked" = 11 ]; then
  echo "error: --locked and --dev do not go together: the test tools are not in requirements.lock" >&2
  exit 2
fi
python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
  echo "error: $python is not there: install Python 3.10 to 3.13 or name it with PYTHON=" >&2
  exit 2
fi

files=(-r "$root/requirements.txt")
if [ "$dev" = 1 ]; then files+=(-r "$root/requirements-dev.txt"); fi
stamp_of() { cat "$root"/requirements*.txt "$root/requirements.sh" "$@" | sha256sum | cut -c1-16; }

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

ngc() {
  # The container's torch and TensorRT are built for each other: every package that is there is held where it is.
  local held kept=()
  held=$(mktemp)
  trap 'rm -f "$held"' RETURN
  "$python" -m pip list --format=freeze 2> /dev/null | grep -E '^[A-Za-z0-9._-]+==[^ ]+$' > "$held"
  if ! has onnxruntime; then kept+=("onnxruntime-gpu>=1.19,<2"); fi
  if ! has pycuda; then kept+=("pycuda>=2024.1"); fi
  local wanted
  wanted=$(mktemp)
  grep -v "$(if has cv2; then echo '^opencv\|'; fi)^gradio" "$root/requirements.txt" > "$wanted"
  files[1]=$wanted
  PIP_CONSTRAINT='' "$python" -m pip install -q -c "$held" "${files[@]}" "${kept[@]}"
  # Of the page alone: what it asks for may not go with what is held, and the other scripts do without it.
  grep '^gradio' "$root/requirements.txt" > "$wanted"
  if ! PIP_CONSTRAINT='' "$python" -m pip install -q -c "$held" -r "$wanted"; then
    echo "note: gradio does not go with this container's packages, so app.py will not run here" >&2
  fi
  rm -f "$wanted"
}

plain() {
  # torch 2.14.1 and torchvision 0.29.1 belong together and are what the tests ran with.
  local torch=(torch==2.14.1 torchvision==0.29.1) more=() index=()
  if [ ! -x "$venv/bin/python" ]; then "$python" -m venv "$venv"; fi
  rm -f "$venv/.requirements.locked"  # it is about to hold more
  python="$venv/bin/python"
  if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
    # TensorRT 10 and 11 share the calls used here; pycuda compiles against the CUDA toolkit.
    more=("onnxruntime-gpu>=1.19,<2" "tensorrt>=10.0,<12" "pycuda>=2024.1")
  else
    more=("onnxruntime>=1.19,<2")
    # PyTorch's own index has builds without CUDA, a tenth of the size. Where it does not answer, PyPI's serve as well.
    if command -v curl > /dev/null && curl -sfIo /dev/null --max-time 5 https://download.pytorch.org/whl/cpu/torch/; then
      index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    else
      echo "note: download.pytorch.org does not answer: PyTorch comes with CUDA, some gigabytes more" >&2
    fi
  fi
  "$python" -m pip install -q "${index[@]}" "${torch[@]}" "${files[@]}" "${more[@]}"
  # Type stubs of TensorRT 10 for the tests; alone, since they ask for the library itself. They would hide a real one.
  if [ "$dev" = 1 ] && ! has tensorrt_bindings; then
    "$python" -m pip install -q --no-deps tensorrt-stubs==10.13.0.35.1
  fi
}

exactly() {
  # Whatever else lies in the folder would be used as well, so it is emptied; but only one that was made here.
  if [ -e "$venv" ] && [ ! -e "$stamp" ]; then
    echo "error: $venv was not set up with --locked: remove it, or name another folder with --venv" >&2
    exit 2
  fi
  "$python" -m venv --clear "$venv"
  echo unfinished > "$stamp"
  # Wheels alone: building from source would fetch tools that no hash holds.
  "$venv/bin/python" -m pip install -q --require-hashes --only-binary :all: -r "$root/requirements.lock"
  if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
    echo "note: TensorRT and ONNX Runtime for GPUs are not in requirements.lock, so here PyTorch uses the GPU" >&2
  fi
}

if [ -n "${NVIDIA_PYTORCH_VERSION:-}" ] && has torch && has tensorrt; then
  if [ "$locked" = 1 ]; then
    echo "error: --locked cannot hold in NVIDIA's container, where its own torch and TensorRT stay: leave it out" >&2
    exit 2
  fi
  stamp="$root/.requirements.$dev"
  if [ "$(cat "$stamp" 2> /dev/null)" != "$(stamp_of)$NVIDIA_PYTORCH_VERSION" ]; then
    echo "NGC PyTorch $NVIDIA_PYTORCH_VERSION: keeping what is installed, adding what is missing"
    ngc
    echo "$(stamp_of)$NVIDIA_PYTORCH_VERSION" > "$stamp"
  fi
  bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
elif [ "$locked" = 1 ]; then
  stamp="$venv/.requirements.locked"
  if [ "$(cat "$stamp" 2> /dev/null)" != "$(stamp_of "$root/requirements.lock")" ]; then
    echo "setting up $venv from requirements.lock (some gigabytes the first time)"
    exactly
    stamp_of "$root/requirements.lock" > "$stamp"
  fi
  bin="$venv/bin"
else
  stamp="$venv/.requirements.$dev"
  if [ "$(cat "$stamp" 2> /dev/null)" != "$(stamp_of)" ]; then
    echo "setting up $venv (some gigabytes the first time)"
    plain
    stamp_of > "$stamp"
  fi
  bin="$venv/bin"
fi

if [ $# -gt 0 ]; then
  PATH="$bin:$PATH" exec "$@"
fi
