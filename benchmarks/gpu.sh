#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked:  bash benchmarks/gpu.sh     (under 9 minutes on an H100)
#
# The tests that need a GPU; then training speed, MFU and memory of the default sizes at 512 and 2048 tokens, ours and
# transformers', eager and compiled, and packed rows: benchmarks/results/train_cuda.json. With DEVICE=cpu the same commands at tiny
# sizes, to see that they run.
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
# what is compiled is kept, so that a second run is shorter; a row is written once it is measured, whatever the time left
TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-output/inductor} \
    timeout $((520 - SECONDS + began)) "$python" benchmarks/train.py --device="$device" ${quick[@]+"${quick[@]}"} "$@" || status=$?
echo "gpu.sh: $((SECONDS - began)) seconds, status $status"
exit "$status"
