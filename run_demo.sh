#!/usr/bin/env bash
# From a bare clone to a model that writes classical Chinese poems:  bash run_demo.sh [MODEL] [--quick]
#
# MODEL is any architecture of model/ (default: mini_deepseekv3). It ends within 20 minutes after the downloads: a
# faster machine trains on more tokens, not for less time. --quick runs every stage in about three minutes,
# with too little training to be good; its files are in output/quick/. PYTHON=... chooses the interpreter.
# A second run skips the stages that are done; a changed argument, preset or architecture file repeats its stage and
# those after it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/venv.sh

usage() {
    sed -n '2,8s/^# \{0,1\}//p' run_demo.sh
}

model= quick=
for argument in "$@"; do
    case $argument in
        --quick) quick=yes ;;
        -h | --help) usage && exit ;;
        -*) die "unknown option $argument: bash run_demo.sh [MODEL] [--quick]" ;;
        *)
            [ -z "$model" ] || die "one model at a time, not $model and $argument: bash run_demo.sh [MODEL] [--quick]"
            model=$argument
            ;;
    esac
done
model=${model:-mini_deepseekv3}
# checked before anything is installed
if ! grep -qF -e "\"$model\"" -e "'$model'" model/*.py; then
    names=$(sed -nE "s/^ +model_name = [\"'](mini_[a-z0-9_]+)[\"'].*/\1/p" model/*.py | sort | tr '\n' ' ')
    die "unknown model $model: there are ${names% } (a new one is a new file in model/)"
fi

out=output
tokenizer_flags=(--vocab_size=5120 --split_han --max_characters=8000000) preprocess_flags=() evaluate_flags=()
# limits for a fast machine, of about four passes over the data: how long it trains is in demo/budget.py
pretrain_flags=(--max_tokens=100000000) sft_flags=(--max_tokens=16000000)
if [ -n "$quick" ]; then
    out=output/quick
    tokenizer_flags=(--vocab_size=5120 --split_han --max_characters=3000000)
    preprocess_flags=(--max_documents=20000)
    pretrain_flags=(--max_steps=100)
    sft_flags=(--max_steps=50)
    evaluate_flags=(--poems=20 --bits_poems=200)
fi

export PYTHONUTF8=1 PYTHONUNBUFFERED=1 # Chinese text whatever the locale; progress at once, also into a pipe
marks=output/.demo times=$out/demo_times.json
run_path=$marks/run_path # the last training stage writes its run folder there
chain= # a hash of the commands and inputs of the stages so far

elapsed() {
    printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60))
}

sha256() {
    if command -v sha256sum >/dev/null; then
        sha256sum | cut -d ' ' -f 1
    else
        shasum -a 256 | cut -d ' ' -f 1 # macOS
    fi
}

# stage NAME RESULT COMMAND...: run the command, unless the file RESULT is still as this command, after the same stages,
# wrote it. $inputs has the inputs that no stage writes. Sets $result.
# $timed: the command gets --max_minutes, chosen when it first starts: an interrupted training needs the same to resume.
inputs= of_model= timed= skipped=
stage() {
    local name=$1 mark start=$SECONDS known
    result=$2
    shift 2
    skipped=
    chain=$(printf '%s\n' "$chain" "$inputs" "$*" | sha256)
    mark=$marks/$name-${chain:0:16}
    if [ -f "$mark" ]; then
        { read -r result && read -r known; } <"$mark"
        if [ -f "$result" ] && [ "$(sha256 <"$result")" = "$known" ]; then
            printf '\n[%s] %s: done before (%s)\n' "$(elapsed)" "$name" "$result"
            skipped=yes
            return
        fi
    fi
    mkdir -p "$marks"
    [ "$result" != run ] || set -- "$@" --write_run_path="$run_path"
    rm -f "$run_path"
    if [ -n "$timed" ]; then
        [ -s "$mark.minutes" ] || "$python" demo/budget.py "$times" "$name" "$of_model" >"$mark.minutes"
        set -- "$@" --max_minutes="$(cat "$mark.minutes")"
    fi
    printf '\n[%s] %s\n$ python %s\n' "$(elapsed)" "$name" "$*"
    "$python" "$@"
    [ "$result" != run ] || result=$(finished_run)
    if [ ! -f "$result" ]; then
        die "$name ended without its result: see above, then give the same command again"
    fi
    printf '%s\n%s\n' "$result" "$(sha256 <"$result")" >"$mark"
    "$python" demo/times.py "$times" "$name" $((SECONDS - start)) $of_model
}

# The path of the last stage's summary.json, if its run finished.
finished_run() {
    local summary
    summary=$(cat "$run_path" 2>/dev/null)/summary.json
    ! grep -q '"status": "finished"' "$summary" 2>/dev/null || printf '%s' "$summary"
}

printf '[%s] python environment\n' "$(elapsed)"
make_venv demo
[ "$SECONDS" -lt 10 ] || "$python" demo/times.py "$times" environment "$SECONDS"
preset=$("$python" demo/preset.py "$model" --output_path "$out")
architecture=$("$python" -c 'import sys; from model import model_file; print(model_file(sys.argv[1]))' "$model")
corpora=output/corpora

stage poems $corpora/poems.jsonl preprocess_data/preprocess_data.py fetch poems
stage idioms $corpora/idioms.jsonl preprocess_data/preprocess_data.py fetch idioms
stage chat $corpora/demo-chat.jsonl preprocess_data/preprocess_data.py fetch demo-chat
stage tokenizer "$out/tokenizer/tokenizer.json" train_tokenizer.py --sources=idioms,poems \
    --tokenizer_path="$out/tokenizer" "${tokenizer_flags[@]}"
stage tokens "$out/data/pretrain_train.meta.json" preprocess_data/preprocess_data.py pretrain --sources=poems,idioms \
    --tokenizer_path="$out/tokenizer" --data_path="$out/data" ${preprocess_flags[@]+"${preprocess_flags[@]}"}
stage chat-tokens "$out/data/sft_train.meta.json" preprocess_data/preprocess_data.py sft --sources=demo-chat \
    --tokenizer_path="$out/tokenizer" --data_path="$out/data"

of_model=$model
[ -n "$quick" ] || timed=yes
inputs="$(cat "$preset" "$architecture" demo/budget.py)"
stage pretrain run pretrain.py --config="$preset" --model_name="$model" --tokenizer_path="$out/tokenizer" \
    --pretrain_data_path="$out/data/pretrain_train.bin" --output_path="$out" ${pretrain_flags[@]+"${pretrain_flags[@]}"}
pretrain_run=$(dirname "$result")

inputs="$(cat configs/sft_cpu.yaml demo/budget.py)"
stage sft run sft.py --config=configs/sft_cpu.yaml --init_from="$pretrain_run" --tokenizer_path="$out/tokenizer" \
    --sft_data_path="$out/data/sft_train.bin" --output_path="$out" ${sft_flags[@]+"${sft_flags[@]}"}
sft_run=$(dirname "$result")

inputs="$(cat demo/*.py)" timed=
stage evaluate "$sft_run/demo.json" demo/evaluate.py --run="$sft_run" --pretrain_run="$pretrain_run" \
    --corpora_path=$corpora ${evaluate_flags[@]+"${evaluate_flags[@]}"}
[ -z "$skipped" ] || "$python" demo/report.py "$sft_run"

printf '\nTime of each stage when it ran:\n'
"$python" demo/times.py "$times" "$model"
