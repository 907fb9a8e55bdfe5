#!/usr/bin/env bash
# Runs one of the scripts in the container, with what it makes in the volume /data.
set -euo pipefail

script=${1:?name a script, such as app.py or enginerun.py}
shift
cd /lseg
# The volume holds what later starts need: exported files, engines, words' embeddings.
mkdir -p /data/onnx /data/engines
exec python "$script" --onnx /data/onnx --engines /data/engines "$@"
