#!/usr/bin/env bash
# Deepctrl SFT, ten million Chinese chat examples, for supervised fine-tuning.
#   from  https://modelscope.cn/datasets/deepctrl/deepctrl-sft-data
#   to    output/corpora/deepctrl-sft/   about 16 GB
#   next  python preprocess_data/preprocess_data.py sft --sources=deepctrl-sft
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/modelscope.sh"

fetch deepctrl/deepctrl-sft-data deepctrl-sft sft_data_zh.jsonl
message "done. Next: python preprocess_data/preprocess_data.py sft --sources=deepctrl-sft"
