#!/usr/bin/env bash
# Seq-monkey, the open Chinese corpus of Mobvoi, 13 million documents, for pretraining.
#   from  https://modelscope.cn/datasets/ddzhu123/seq-monkey
#   to    output/corpora/seq-monkey/   about 12 GB compressed (removed afterwards), 33 GB decompressed
#   next  python preprocess_data/preprocess_data.py pretrain --sources=seq-monkey
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/modelscope.sh"

name=mobvoi_seq_monkey_general_open_corpus.jsonl
folder=$corpora/seq-monkey
if [ ! -s "$folder/$name" ]; then
    fetch ddzhu123/seq-monkey seq-monkey "$name.tar.bz2"
    archive=$(find "$folder" -name "$name.tar.bz2" -print -quit)
    message "decompressing $archive ..."
    # Under a hidden name until it is complete, which preprocess_data.py ignores.
    if ! tar -xjOf "$archive" > "$folder/.$name.partial"; then
        message "error: $archive cannot be decompressed (truncated, or the disk is full): make room, delete it and run this again"
        exit 2
    fi
    mv "$folder/.$name.partial" "$folder/$name"
    rm -f "$archive"
fi
message "done. Next: python preprocess_data/preprocess_data.py pretrain --sources=seq-monkey"
