"""Small tokenizers, trained in a moment."""

import random
from pathlib import Path

from preprocess_data.pipeline.train_bpe import save, train
from tests.support.texts import SENTENCES
from utils.tokenizer import N_SPECIAL, Tokenizer

N_BYTES = N_SPECIAL + 256  # a vocabulary without merges: one token per byte


def make_tokenizer(folder: Path, vocab_size: int = N_BYTES, split_han: bool = False, texts=None) -> Tokenizer:
    """Train a tokenizer on `texts`, by default on a few sentences, and save it in `folder`."""
    if texts is None:
        texts = (random.Random(i).choice(SENTENCES) + str(i) for i in range(400))
    return save(train(iter(texts), vocab_size, split_han=split_han), folder)
