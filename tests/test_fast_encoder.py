"""gigatoken is used where its ids equal those of tokenizers, and rejected for every tokenizer where they differ."""

import copy
import json
import os
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from preprocess_data.pipeline import fast_encoder
from preprocess_data.pipeline.fast_encoder import (
    FAST,
    REFERENCE,
    FastTokenizer,
    choose_encoder,
    encode_documents,
)
from preprocess_data.preprocess_data import main
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE, SENTENCES, random_text, write_lines
from utils.text import clean_text
from utils.tokenizer import load_tokenizer

pytest.importorskip("gigatoken")
TEXTS = int(os.environ.get("TEXTS", 2000))
GPT2 = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="module", params=[False, True], ids=["", "split_han"])
def tokenizer(tmp_path_factory, request):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 1000, request.param)


def altered(tokenizer, folder, change):
    """The tokenizer with another tokenizer.json."""
    data = copy.deepcopy(json.loads((tokenizer.path / "tokenizer.json").read_text(encoding="utf-8")))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return load_tokenizer(folder)


def at(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def added(data):
    token = {"id": len(data["model"]["vocab"]), "content": "明月", "single_word": False, "lstrip": False}
    data["added_tokens"].append({**token, "rstrip": False, "normalized": True, "special": False})


splits = ("pre_tokenizer", "pretokenizers")
OTHERS = {
    "prefix space in the sequence": at(*splits, 3, "add_prefix_space", value=True),
    "prefix space, no regex": at("pre_tokenizer", value={**GPT2, "add_prefix_space": True, "use_regex": False}),
    "no regex": at("pre_tokenizer", value={**GPT2, "add_prefix_space": False, "use_regex": False}),
    "no pre-tokenizer": at("pre_tokenizer", value=None),
    "another regex": at(*splits, 0, "pattern", value={"Regex": r"\p{N}"}),
    "matches removed": at(*splits, 0, "behavior", value="Removed"),
    "lower case": at("normalizer", value={"type": "Lowercase"}),
    "replacing": at("normalizer", value={"type": "Replace", "pattern": {"String": " "}, "content": "_"}),
    "prepending": at("normalizer", value={"type": "Prepend", "prepend": "_"}),
    "dropout": at("model", "dropout", value=0.1),
    "byte fallback": at("model", "byte_fallback", value=True),
    "end of word": at("model", "end_of_word_suffix", value="</w>"),
    "an added token": added,
}
# Changes without an effect on cleaned text: the fast encoder may be used, with the same ids.
SAME_IDS = {
    "nothing": lambda data: None,
    "unk": at("model", "unk_token", value="<unk>"),
    "NFC": at("normalizer", value={"type": "NFC"}),
    "GPT-2's regex": at("pre_tokenizer", value={**GPT2, "add_prefix_space": False}),
    "GPT-2's regex and prefix space": at("pre_tokenizer", value={**GPT2, "add_prefix_space": True}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("plain"), 1000)


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_where_it_differs_is_encoded_by_the_reference(plain, tmp_path, name):
    library, why = choose_encoder(altered(plain, tmp_path, OTHERS[name]), "auto", SENTENCES)
    assert library == REFERENCE and ("gives other ids for" in why or "does not take" in why)


def same(tokenizer, texts):
    fast = FastTokenizer(tokenizer)
    expected = [Backend.encode(tokenizer.backend, text, add_special_tokens=False).ids for text in texts]
    assert fast.encode_batch(texts) == expected == [fast.encode(text) for text in texts]
    ids, lengths = encode_documents(fast, texts)
    reference = encode_documents(tokenizer, texts)
    assert (ids == reference[0]).all() and (lengths == reference[1]).all() and lengths.sum() == len(ids)
    starts = np.cumsum([0, *lengths[:-1]])
    for start, length, one in zip(starts, lengths, expected):
        assert ids[start : start + length].tolist() == [tokenizer.bos_id, *one, tokenizer.eos_id]


@pytest.mark.parametrize("name", SAME_IDS)
def test_where_it_is_used_the_ids_are_equal(tokenizer, tmp_path, name):
    other = altered(tokenizer, tmp_path, SAME_IDS[name])
    assert choose_encoder(other, "auto", SENTENCES)[0] == FAST
    same(other, [text for text in map(clean_text, [*HOSTILE, *SENTENCES]) if text])


def test_the_table_is_used_only_if_no_token_spans_a_chinese_character_and_its_neighbor(tokenizer):
    spanning = [i for i in range(tokenizer.vocab_size) if re.search(".[一-龥]|[一-龥].", tokenizer.decode([i]), re.S)]
    fast = FastTokenizer(tokenizer)
    assert (fast._placeholder is None) == bool(spanning)
    texts = ["床前", "床a前", "前", "a床前，明月b", "床前\n明月 光", "𠮷床𠮷", "龦前龥一", "床龘龘前龘", "abc"]
    same(tokenizer, [*texts, "前" * 300, *map(chr, range(0x4DF0, 0x9FB0)), "".join(map(chr, range(0x4DF0, 0x9FB0)))])


def test_the_cache_of_the_library_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_encoder, "CACHED_CHARACTERS", 100)
    fast = FastTokenizer(tokenizer)
    first = fast._fast
    assert [fast.encode_batch([text]) for text in SENTENCES * 5] == [tokenizer.encode_batch([t]) for t in SENTENCES * 5]
    assert fast._fast is not first


def test_characters_that_no_pattern_matches(tokenizer):
    """Emoji lead to merges across characters: with adjacent unassigned ones the libraries pre-tokenize differently."""
    strange = [*"\U00032802\U0001fef7\U000570cd\U0001f8d1\ue000\U000f0000\u200d\u200b\u00ad"]
    texts = [a + b for a in strange for b in strange] + ["前" + a + "b" + b for a in strange for b in strange]
    same(tokenizer, [*texts, "x", "".join(strange), *SENTENCES])


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text() | st.sampled_from(HOSTILE), min_size=1, max_size=5))
def test_random_texts_have_the_same_ids(tokenizer, texts):
    texts = [text for text in map(clean_text, texts) if text]
    same(tokenizer, texts or ["x"])


def test_random_texts_round_trip(tokenizer):
    """Any Unicode for the reference; cleaned, as every document is, for both."""
    random_, fast = random.Random(TEXTS), FastTokenizer(tokenizer)
    for _ in range(TEXTS // 500):
        texts = [random_text(random_, random_.randrange(1, 60)) for _ in range(500)]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(ids, skip_special=False) == text
        texts = [text for text in map(clean_text, texts) if text]
        ids = fast.encode_batch(texts)
        assert ids == tokenizer.encode_batch(texts)
        assert [tokenizer.decode(row, skip_special=False) for row in ids] == texts


def test_choice_by_documents_by_flag_and_without_the_library(plain, monkeypatch):
    tokenizer = plain
    assert choose_encoder(tokenizer, REFERENCE, []) == (REFERENCE, "asked for")
    real = FastTokenizer.encode_batch
    monkeypatch.setattr(FastTokenizer, "encode_batch", lambda self, texts: [
        [*ids, 5] if text == SENTENCES[0] else ids for text, ids in zip(texts, real(self, texts))
    ])  # fmt: skip
    library, why = choose_encoder(tokenizer, "auto", ["x", SENTENCES[0]])
    assert library == REFERENCE and "other ids for one of the documents, '床前" in why
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert choose_encoder(tokenizer, "auto", [])[1] == "gigatoken is not installed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_any_workers_and_both_encoders_write_the_same_bytes(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 5000)
    texts = [f"{SENTENCES[i % len(SENTENCES)]}{i}{HOSTILE[i % len(HOSTILE)]}" for i in range(3000)]
    rows = [{"text": text} if kind == "pretrain" else {"q": text, "a": text[::-1]} for text in texts]
    source, metas = write_lines(tmp_path / "my.jsonl", [*rows, "{"]), []
    for encoder in ("auto", REFERENCE):
        for workers in (1, 2, 4):
            out = tmp_path / f"{encoder}{workers}"
            main([kind, f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={out}",
                  "--max_bad_ratio=1", f"--workers={workers}", f"--encoder={encoder}"])  # fmt: skip
            metas.append([json.loads((out / f"{kind}_{split}.meta.json").read_text()) for split in ("train", "val")])
            assert metas[-1][0]["encoder"].startswith(FAST if encoder == "auto" else REFERENCE)
            for name in ("train.docs.npy", "val.docs.npy", "rejects.jsonl"):
                first = (tmp_path / "auto1" / f"{kind}_{name}").read_bytes()
                assert (out / f"{kind}_{name}").read_bytes() == first and first
    assert len({tuple(meta["sha256"] for meta in pair) for pair in metas}) == 1
