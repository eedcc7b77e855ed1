#!/usr/bin/env bash
# Seq-monkey, the open Chinese corpus of Mobvoi, 13 million documents, for pretraining.
#   from  https://modelscope.cn/datasets/ddzhu123/seq-monkey
#   to    output/corpora/seq-monkey/   about 12 GB packed (removed after unpacking), 33 GB unpacked
#   next  python preprocess_data/preprocess_data.py pretrain --sources=seq-monkey
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/modelscope.sh"

name=mobvoi_seq_monkey_general_open_corpus.jsonl
folder=$corpora/seq-monkey
if [ ! -s "$folder/$name" ]; then
    fetch ddzhu123/seq-monkey seq-monkey "$name.tar.bz2"
    packed=$(find "$folder" -name "$name.tar.bz2" -print -quit)
    say "unpacking $packed ..."
    # Under another name until it is whole, where preprocess_data.py does not look.
    if ! tar -xjOf "$packed" > "$folder/.$name.partial"; then
        say "error: $packed cannot be unpacked (cut off, or the disk is full): make room, delete it and run this again"
        exit 2
    fi
    mv "$folder/.$name.partial" "$folder/$name"
    rm -f "$packed"
fi
say "done. Next: python preprocess_data/preprocess_data.py pretrain --sources=seq-monkey"
