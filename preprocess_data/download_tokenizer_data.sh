#!/usr/bin/env bash
# Chinese Wikipedia, 255 thousand articles, for the tokenizer (and good for pretraining too).
#   from  https://modelscope.cn/datasets/AI-ModelScope/wikipedia-cn-20230720-filtered  (a copy of pleisto's)
#   to    output/corpora/wikipedia-cn/   0.5 GB
#   next  python train_tokenizer.py --sources=wikipedia-cn
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/modelscope.sh"

fetch AI-ModelScope/wikipedia-cn-20230720-filtered wikipedia-cn '*.json'
message "done. Next: python train_tokenizer.py --sources=wikipedia-cn"
