#!/usr/bin/env bash
# Tests and benchmarks for an NVIDIA GPU:  bash benchmarks/gpu.sh     (under 9 minutes on an H100)
#
# The tests that need a GPU; then training speed, MFU and memory of the default sizes at 512 and 2048 tokens, ours and
# transformers', eager and compiled, and packed sequences: benchmarks/results/train_cuda.json. DEVICE=cpu runs the same
# commands at tiny sizes, to check that they work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh

device=${DEVICE:-cuda}
make_venv test
quick=()
[ "$device" = cuda ] || quick=(--quick --memory=false "--results=${RESULTS:-output/train_quick.json}")
began=$SECONDS
status=0
"$python" -m pytest -m gpu tests/test_gpu.py || status=$?
# the compile cache is kept, so that a second run is shorter; a result is written once it is measured
TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-output/inductor} \
    timeout $((520 - SECONDS + began)) "$python" benchmarks/train.py --device="$device" ${quick[@]+"${quick[@]}"} "$@" || status=$?
echo "gpu.sh: $((SECONDS - began)) seconds, status $status"
exit "$status"
