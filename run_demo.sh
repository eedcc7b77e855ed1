#!/usr/bin/env bash
# From a bare clone to a model that writes classical Chinese poems:  bash run_demo.sh [MODEL] [--quick]
#
# MODEL is any architecture of model/ (default: mini_deepseekv3). --quick goes through every stage in about three
# minutes, with too little training to be good; its files are in output/quick/. PYTHON=... chooses the interpreter.
# A second run skips what is done; a changed argument, preset or architecture file does its stage, and all after it, again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. demo/venv.sh

usage() {
    sed -n '2,6s/^# \{0,1\}//p' run_demo.sh
}

model=mini_deepseekv3 quick=
for argument in "$@"; do
    case $argument in
        --quick) quick=yes ;;
        -h | --help) usage && exit ;;
        -*) die "unknown option $argument: bash run_demo.sh [MODEL] [--quick]" ;;
        *) model=$argument ;;
    esac
done

out=output
vocab_size=5120
pretrain_flags=() sft_flags=() preprocess_flags=() evaluate_flags=()
if [ -n "$quick" ]; then
    out=output/quick
    vocab_size=2048
    preprocess_flags=(--max_documents=20000)
    pretrain_flags=(--max_steps=150)
    sft_flags=(--max_steps=60)
    evaluate_flags=(--poems=20)
fi

export PYTHONUTF8=1 PYTHONUNBUFFERED=1 # Chinese text on any locale; progress that shows at once, also in a pipe
keys=$out/.demo times=$out/demo_times_$model.json
key=

elapsed() {
    printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60))
}

# stage NAME RESULT INPUTS COMMAND...   runs the command unless RESULT is there and was made by the same command from the
# same INPUTS (a string) after the same earlier stages.
stage() {
    local name=$1 result=$2 inputs=$3 start=$SECONDS
    shift 3
    key=$(printf '%s\n' "$key" "$inputs" "$*" | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ -e "$result" ] && [ "$(cat "$keys/$name" 2>/dev/null)" = "$key" ]; then
        printf '\n[%s] %s: already done (%s)\n' "$(elapsed)" "$name" "$result"
        return
    fi
    printf '\n[%s] %s\n' "$(elapsed)" "$name"
    printf '$ %s\n' "${*/#$python/python}"
    "$@"
    mkdir -p "$keys"
    printf '%s\n' "$key" >"$keys/$name"
    "$python" demo/times.py "$times" "$name" $((SECONDS - start))
}

# The newest run of a stage; a run with other settings than the one before gets a folder of its own, numbered.
newest() {
    ls -td "$out/$1_$model/summary.json" "$out/$1_$model"_[0-9]*/summary.json 2>/dev/null | head -n 1 | xargs dirname
}

printf '[%s] python environment\n' "$(elapsed)"
make_venv
preset=$("$python" demo/preset.py "$model" --output_path "$out")
echo "model $model, preset $preset"
architecture=$("$python" -c 'import sys; from model import model_file; print(model_file(sys.argv[1]))' "$model")
