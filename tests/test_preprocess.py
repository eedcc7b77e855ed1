import gzip
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess_data.pipeline import prepare
from preprocess_data.pipeline.token_writer import token_dtype
from preprocess_data.preprocess_data import main
from preprocess_data.readers.chat import ChatExample, to_messages
from preprocess_data.readers.records import InvalidRecord
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import HOSTILE, SENTENCES, write_lines
from utils.chat_template import encode_chat
from utils.errors import UserError
from utils.text import clean_text

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".bin", ".docs.npy", ".meta.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def run(kind: str, tokenizer, source, out: Path, *flags: str) -> tuple[dict, dict]:
    paths = [f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={out}"]
    main([kind, *paths, "--workers=1", "--max_bad_ratio=1", "--encoder=tokenizers", *flags])
    return tuple(json.loads((out / f"{kind}_{split}.meta.json").read_text()) for split in ("train", "val"))


def documents_of(folder: Path, name: str, tokenizer) -> list[str]:
    """The texts in a token file, each checked to be between <s> and </s>."""
    meta = json.loads((folder / f"{name}.meta.json").read_text())
    tokens = np.fromfile(folder / f"{name}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<"))
    starts = np.load(folder / f"{name}.docs.npy")
    assert starts.dtype == np.uint64 and len(tokens) == meta["tokens"] and len(starts) == meta["documents"]
    assert hashlib.sha256((folder / f"{name}.bin").read_bytes()).hexdigest() == meta["sha256"]
    texts = []
    for part in np.split(tokens, starts[1:].astype(np.int64)) if len(starts) else []:
        assert part[0] == tokenizer.bos_id and part[-1] == tokenizer.eos_id
        texts.append(tokenizer.decode(part[1:-1].tolist(), skip_special=False))
    return texts


def some_texts(count: int) -> list[str]:
    return [f"{SENTENCES[i % len(SENTENCES)]}{i}{HOSTILE[i % len(HOSTILE)]}" for i in range(count)]


def test_texts_come_back_split_as_the_design_says(tokenizer, tmp_path):
    texts = some_texts(400)
    source = write_lines(tmp_path / "my.jsonl", [{"text": text} for text in texts])
    train, val = run("pretrain", tokenizer, source, tmp_path / "out")
    cleaned = [clean_text(text) for text in texts]
    held_out = [text for text in cleaned if int(hashlib.sha1(text.encode()).hexdigest(), 16) % 50 == 0]
    assert held_out
    assert documents_of(tmp_path / "out", "pretrain_val", tokenizer) == held_out
    kept = documents_of(tmp_path / "out", "pretrain_train", tokenizer)
    assert kept == [text for text in cleaned if text not in held_out]
    assert train["characters"] == sum(map(len, kept)) and val["characters"] == sum(map(len, held_out))
    assert train["vocab_size"] == tokenizer.vocab_size > train["max_id"]
    assert train["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert train["sources"] == [str(source)] and train["dropped"] == {}


def test_any_number_of_workers_and_either_encoder_write_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 2000)
    source = write_lines(tmp_path / "my.jsonl", [{"text": text} for text in some_texts(600)])
    ways = [(1, "tokenizers"), (2, "tokenizers"), (4, "auto"), (1, "auto")]
    for workers, encoder in ways:
        folder = tmp_path / f"{workers}{encoder}"
        run("pretrain", tokenizer, source, folder, f"--workers={workers}", f"--encoder={encoder}")
    for split in ("train", "val"):
        for suffix in SUFFIXES:
            files = [(tmp_path / f"{w}{e}" / f"pretrain_{split}{suffix}").read_bytes() for w, e in ways]
            assert files[0] == files[1] and files[2] == files[3]
            assert (files[0] == files[2]) == (suffix != ".meta.json")  # which names the encoder


def test_invalid_and_filtered_records_are_counted_by_reason(tokenizer, tmp_path):
    records = [
        {"text": "好文章"},
        "{broken",
        b'"\xff\xfe"',
        {"text": 7},
        {"other": "x"},
        {"text": " \x00\n"},
        {"text": "长" * 50},
        [1],
        b"",
        {"text": "又一篇"},
    ]
    train, val = run(
        "pretrain",
        tokenizer,
        write_lines(tmp_path / "my.jsonl", records),
        tmp_path / "out",
        "--min_characters=2",
        "--max_characters=40",
    )
    assert train["dropped"] == {"too long": 1}
    assert train["bad"] == {"broken JSON": 1, "empty": 1, "no text in the field 'text'": 3, "not UTF-8": 1}
    rejects = [json.loads(line) for line in (tmp_path / "out/pretrain_rejects.jsonl").open()]
    assert {record["file"] for record in rejects} == {str(tmp_path / "my.jsonl")}
    assert [(record["line"], record["reason"]) for record in rejects] == [
        (2, "broken JSON"),
        (3, "not UTF-8"),
        (4, "no text in the field 'text'"),
        (5, "no text in the field 'text'"),
        (6, "empty"),
        (8, "no text in the field 'text'"),
    ]
    assert train["documents"] + val["documents"] == 2


def test_every_format_gives_the_same_tokens(tokenizer, tmp_path):
    texts = ["第一篇。", "第二篇，\n两行。", "third"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    files = {
        "a.jsonl": lines,
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.json": json.dumps([{"text": t} for t in texts]).encode(),
        "lines.json": lines,
        "d.txt": "\n\n".join(texts).encode(),
        "crlf.txt": "\r\n\r\n".join(texts).replace("，\n", "，\r\n").encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        run("pretrain", tokenizer, tmp_path / name, tmp_path / f"out_{name}")
        assert documents_of(tmp_path / f"out_{name}", "pretrain_train", tokenizer) == texts, name


def test_truncated_gzip_keeps_what_was_read(tokenizer, tmp_path):
    packed = gzip.compress(
        "".join(json.dumps({"text": f"第{i}篇 {hash(i * 7919)}"}) + "\n" for i in range(9999)).encode()
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    train, _ = run("pretrain", tokenizer, tmp_path / "cut.jsonl.gz", tmp_path / "out")
    assert train["documents"] > 100 and train["bad"] == {"truncated gzip, the rest of the file is unread": 1}


def test_folder_glob_where_and_limit(tokenizer, tmp_path, capsys):
    for name in ("a", "b"):
        records = [{"text": f"{name}{i}", "kind": ("x", "y")[i % 2]} for i in range(10)]
        write_lines(tmp_path / "in" / f"{name}.jsonl", records)
    (tmp_path / "in" / ".unfinished.jsonl").write_text("{")
    for name in ("notes.pdf", "README.md", "pretrain_report.md", "pretrain_rejects.jsonl"):
        (tmp_path / "in" / name).write_text("not read")
    folder, _ = run("pretrain", tokenizer, tmp_path / "in", tmp_path / "1")
    globbed, _ = run("pretrain", tokenizer, tmp_path / "in" / "*.jsonl", tmp_path / "2")
    assert folder["sha256"] == globbed["sha256"] and len(folder["sources"]) == 2
    assert "skipped 1 files of unknown type (notes.pdf)" in capsys.readouterr().out
    with pytest.raises(UserError, match="twice"):
        run("pretrain", tokenizer, f"{tmp_path / 'in'},{tmp_path / 'in' / 'a.jsonl'}", tmp_path / "4")
    run("pretrain", tokenizer, tmp_path / "in", tmp_path / "3", "--where=kind=y", "--max_documents=2")
    texts = [documents_of(tmp_path / "3", f"pretrain_{split}", tokenizer) for split in ("train", "val")]
    assert sorted(sum(texts, [])) == ["a1", "a3"]


def test_a_failure_leaves_the_old_files_and_no_half_ones(tokenizer, tmp_path):
    run("pretrain", tokenizer, write_lines(tmp_path / "ok.jsonl", [{"text": "好"}]), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="nothing left to write"):
        run("pretrain", tokenizer, write_lines(tmp_path / "empty.jsonl", []), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "kind,lines,flags,reason,advice",
    [
        ("pretrain", ['{"content": "a"}'] * 3, [], "no text in the field 'text'", "--text_field"),
        ("pretrain", ["{"], [], "broken JSON", "docs/preprocessing.md"),
        ("pretrain", ['{"text": "春天"}'.encode("gbk")], [], "GB18030", "docs/preprocessing.md"),
        ("sft", ['{"q": "a", "a": "b", "weight": 0}'], [], "no answer with loss", "docs/preprocessing.md"),
        ("sft", ['{"chosen": "a", "rejected": "b"}'], [], "a preference pair", "docs/preprocessing.md"),
        ("sft", ['{"text": "a"}'], [], "a text, for pretrain", "docs/preprocessing.md"),
        ("pretrain", ['{"text": "a"}', "{", "{"], ["--min_characters=9"], "too short", "docs/preprocessing.md"),
        ("pretrain", ['{"text": "a"}'] * 2, ["--min_characters=9"], "too short", "--min_characters"),
    ],
)
def test_when_no_record_is_left_the_list_of_rejects_stays(tokenizer, tmp_path, kind, lines, flags, reason, advice):
    source = write_lines(tmp_path / "bad.jsonl", lines)
    with pytest.raises(UserError, match="nothing left to write") as error:
        run(kind, tokenizer, source, tmp_path / "out", *flags)
    message = str(error.value)
    assert reason in message and advice in message.rpartition("): ")[2] and "\n" not in message
    rejects = re.search(r"listed in (\S+)\)", message)
    count = sum(reason != "no answer with loss" and (line != '{"text": "a"}' or kind == "sft") for line in lines)
    assert bool(rejects) == bool(count)
    if rejects:
        assert len(Path(rejects[1]).read_text().splitlines()) == count
    good = write_lines(tmp_path / "good.jsonl", [{"text": f"{i}", "q": "a", "a": f"{i}"} for i in range(60)])
    train, _ = run(kind, tokenizer, good, tmp_path / "out")
    assert train["bad"] == {} and not list((tmp_path / "out").glob("*rejects*"))
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".preprocess.lock"]


def slowly_cleaned(text: str) -> str:
    """clean_text by its definition, one rule after another."""
    for newline in ("\r\n", "\r", "\x85", "\u2028", "\u2029"):
        text = text.replace(newline, "\n")
    gone = [*range(9), *range(11, 32), *range(127, 133), *range(134, 160), 0xFEFF, *range(0xD800, 0xE000)]
    gone += [*range(0xFDD0, 0xFDF0), 0xFFFE, 0xFFFF]
    text = unicodedata.normalize("NFC", text.translate(dict.fromkeys(gone)))
    text = "\n".join(line.rstrip(" \t\u3000") for line in text.split("\n"))
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    text = text.rstrip()
    while text[: len(text) - len(text.lstrip())].strip(" \t"):  # more than the indentation of the first line
        text = text[1:]
    return text


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab中 \t\n\r\u3000\x00\x85\u2028\ufeffe\u0301\ud800\uffff\x1c\xa0"), max_size=12))
def test_clean_text_and_its_short_cut(text):
    assert clean_text(text) == slowly_cleaned(text) == clean_text(clean_text(text))


@pytest.mark.parametrize(
    "text,cleaned",
    [
        ("    if x:\n        y\n", "    if x:\n        y"),
        ("\n\n\tdef f():\n\t\tpass", "\tdef f():\n\t\tpass"),
        (" \r\n  - a\r\n    - b", "  - a\n    - b"),
        ("    return x", "    return x"),
        ("\u3000\u3000第一章\n  ", "第一章"),
        ("\ufeff  a\u3000", "  a"),
        ("\u3000 \t a", " \t a"),
        ("a\n   \n\n\n  b", "a\n\n  b"),
        ("\t \n", ""),
    ],
)
def test_code_stays_code(text, cleaned):
    assert clean_text(text) == cleaned


def test_too_many_invalid_records_stop_the_run_and_a_higher_ratio_resumes_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess_data.pipeline.counts.MIN_RECORDS", 100)
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 500)
    good = [{"text": text} for text in some_texts(1000) if clean_text(text)]
    source = write_lines(tmp_path / "a.jsonl", [*good[:400], "{", "{", *good[400:]])
    message = "2 of 4.. records are invalid, more than --max_bad_ratio=0.001 .2 broken JSON"
    with pytest.raises(UserError, match=message) as error:
        run("pretrain", tokenizer, source, tmp_path / "out", "--max_bad_ratio=0.001")
    assert "\n" not in str(error.value) and not list((tmp_path / "out").glob("[!.]*"))
    rejects = Path(re.search(r"see (\S+):", str(error.value))[1])
    assert [json.loads(line)["line"] for line in rejects.open()] == [401, 402]
    train, val = run("pretrain", tokenizer, source, tmp_path / "out", "--max_bad_ratio=0.005")
    assert train["documents"] + val["documents"] == len(good) and train["bad"] == {"broken JSON": 2}
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".preprocess.lock"]
    few = write_lines(tmp_path / "few.jsonl", [*good[:9], "{"])  # judged at the end in any case
    with pytest.raises(UserError, match="1 of 10 records are invalid"):
        run("pretrain", tokenizer, few, tmp_path / "few", "--max_bad_ratio=0.001")
    for ratio in ("-1", "2"):
        with pytest.raises(UserError, match="must be at least 0 and at most 1"):
            run("pretrain", tokenizer, few, tmp_path / "few", f"--max_bad_ratio={ratio}")


def test_the_limit_is_exact_for_any_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess_data.readers.records.CHUNK_BYTES", 500)
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", ["{"] + [{"text": f"{name}{i}"} for i in range(500)])
    sources = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    for workers in (1, 2):
        out = tmp_path / str(workers)
        run("pretrain", tokenizer, sources, out, "--max_documents=120", f"--workers={workers}")
        found = sum((documents_of(out, f"pretrain_{split}", tokenizer) for split in ("train", "val")), [])
        assert sorted(found) == sorted(f"{name}{i}" for name in "ab" for i in range(119))


def test_large_vocabulary_takes_four_bytes():
    assert token_dtype(65_536) == np.dtype("<u2") and token_dtype(65_537) == np.dtype("<u4")


CHAT = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
LAYOUTS = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]},
    {"instruction": "你好", "input": "", "output": "你好！"},
    {"instruction": "", "input": "你好", "output": "你好！"},
    {"q": "你好", "a": "你好！", "history": []},
    {"input": "你好", "output": "你好！"},
    {"instruction": "", "input": "你好", "output": "你好！", "history": "[]"},
    {"instruction": "你好", "context": "", "response": "你好！"},
    {"prompt": "你好", "completion": "你好！", "history": ""},
    {"query": "你好", "response": "你好！", "history": []},
    {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "你好！"}]}]},
]


@pytest.mark.parametrize("record", LAYOUTS)
def test_every_layout_gives_the_same_conversation(record):
    assert to_messages(record) == ChatExample(CHAT)


def test_a_deeply_nested_history_is_one_invalid_record():
    record = {"q": "一", "a": "二", "history": "[" * 200_000}
    assert to_messages(record).reason == "missing or mistyped fields"


def test_history_system_and_input_are_kept():
    messages = to_messages({"q": "三", "a": "四", "history": [["一", "二"]], "system": "诗人"}).messages
    assert [m["content"] for m in messages] == ["诗人", "一", "二", "三", "四"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    for history in ([["一", "二"]], ["一", "二"], '[["一", "二"]]'):
        record = {"input": "三", "output": "四", "history": history, "system_prompt": "诗人"}
        assert to_messages(record).messages == messages
    turns = [{"from": "human", "value": "三"}, {"from": "gpt", "value": "四"}]
    messages = to_messages({"system": "诗人", "conversations": turns}).messages
    assert [m["content"] for m in messages] == ["诗人", "三", "四"]
    messages = to_messages({"system": "别用", "conversations": [{"from": "system", "value": "诗人"}, *turns]}).messages
    assert [m["content"] for m in messages] == ["诗人", "三", "四"]
    messages = to_messages({"instruction": "翻译", "input": "hello", "output": "你好"}).messages
    assert messages[0]["content"] == "翻译\nhello"


def test_chat_tokens_and_mask_are_those_of_encode_chat(tokenizer, tmp_path):
    chats = [
        [{"role": "user", "content": f"问{i}<|im_end|>"}, {"role": "assistant", "content": f"答{i}"}]
        for i in range(100)
    ]
    records = [{"messages": chat, "held_out": i % 10 == 0} for i, chat in enumerate(chats)]
    bad = [
        "{",
        {"messages": CHAT[:1]},
        {"x": 1},
        {"q": 1, "a": "b"},
        {"messages": [{"role": "w", "content": "x"}]},
        {"messages": [{"role": "user", "content": ""}, CHAT[1]]},
        {"q": "一", "a": "二", "history": "not json"},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]},
    ]
    train, val = run("sft", tokenizer, write_lines(tmp_path / "chat.jsonl", records + bad), tmp_path / "out")
    assert (train["documents"], val["documents"], train["kind"]) == (90, 10, "sft")
    assert train["bad"] == {
        "a conversation as text that is not JSON": 1,
        "broken JSON": 1,
        "empty turn": 1,
        "image, which cannot be read": 1,
        "missing or mistyped fields": 1,
        "no answer in the row": 1,
        "unknown layout": 1,
        "unknown role": 1,
    }
    assert val["characters"] == sum(len(chat[1]["content"]) for chat in chats[::10])
    expected = [encode_chat(tokenizer, chat) for chat in chats[::10]]
    assert np.fromfile(tmp_path / "out/sft_val.bin", "<u2").tolist() == sum((ids for ids, _ in expected), [])
    assert np.fromfile(tmp_path / "out/sft_val.mask.bin", np.uint8).tolist() == sum((mask for _, mask in expected), [])
    assert (
        np.load(tmp_path / "out/sft_val.docs.npy").tolist()
        == np.cumsum([0] + [len(ids) for ids, _ in expected[:-1]]).tolist()
    )


@pytest.mark.parametrize(
    "command,folder", [("preprocess_data.py", "preprocess_data"), ("preprocess_data/preprocess_data.py", ".")]
)
def test_the_command_works_inside_its_folder_and_from_the_root(tokenizer, tmp_path, command, folder):
    write_lines(
        tmp_path / "corpora/poems.jsonl",
        [{"title": f"题{i}", "author": "李白", "text": "床前明月光，疑是地上霜。"} for i in range(60)],
    )
    write_lines(tmp_path / "corpora/demo-chat.jsonl", [{"messages": CHAT, "held_out": False}])
    done = subprocess.run(
        [
            sys.executable,
            command,
            f"--corpora_path={tmp_path / 'corpora'}",
            f"--tokenizer_path={tokenizer.path}",
            f"--data_path={tmp_path / 'out'}",
            "--workers=2",
        ],
        cwd=ROOT / folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").glob("*.bin")} == {
        "pretrain_train.bin",
        "pretrain_val.bin",
        "sft_train.bin",
        "sft_val.bin",
        "sft_train.mask.bin",
        "sft_val.mask.bin",
    }
    assert documents_of(tmp_path / "out", "pretrain_train", tokenizer)[0] == "题0\n李白\n床前明月光，疑是地上霜。"


@pytest.mark.parametrize(
    "argv,message",
    [
        (["pretrain", "--sources=nothing.jsonl"], "no data file nothing.jsonl"),
        (["pretrain", "--sources=seq-monkey"], "download_pretrain_data.sh"),
        (["pretrain", "--sources=demo-chat"], "use it with sft"),
        (["pretrain"], "fetch poems"),
        (["sft"], "fetch demo-chat"),
        ([], "fetch demo-chat"),
        (["pretrain", "--source=x"], "did you mean --sources"),
        (["fetch", "novels"], "poems, idioms, demo-chat"),
        (["fetch", "demo-chat"], "fetch poems first"),
        (["fetch", "demo-chat", "--rows=-5"], "--rows=-5: must be at least 1"),
        (["pretrain", "--max_documents=-1"], "must be at least 0"),
        (["pretrain", "--where=form"], "FIELD=VALUE"),
        (["clean"], "unknown command clean"),
        (["pretrain", f"--sources={__file__}"], "no reader for"),
    ],
)
def test_user_errors_in_one_line(tmp_path, tokenizer, argv, message):
    folder = [] if "novels" in argv else [f"--corpora_path={tmp_path}"]
    if "fetch" not in argv:
        folder.append(f"--tokenizer_path={tokenizer.path}")
    with pytest.raises(UserError) as error:
        main([*argv, *folder])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_encoder_is_chosen_without_searching_all_of_a_corpus_that_has_no_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MIN_RECORDS", 10)
    source = write_lines(tmp_path / "a.jsonl", [{"x": i} for i in range(1000)])
    seen = []

    def choose(reference, wanted, documents):
        seen.extend(documents)
        return "tokenizers", "asked for"

    real = prepare.find_sources

    def find(*arguments):
        found = real(*arguments)
        monkeypatch.setattr(type(found[0]), "texts", texts)
        return found

    def texts(self):
        for i in range(1000):
            seen.append(i)
            yield InvalidRecord("no text")

    monkeypatch.setattr(prepare, "choose_encoder", choose)
    monkeypatch.setattr(prepare, "find_sources", find)
    with pytest.raises(UserError, match="nothing left to write"):
        run("pretrain", tokenizer, source, tmp_path / "out")
    assert seen == list(range(10))


def test_a_deep_line_is_one_reject(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "一"}\n{"x": ' + "[" * 1015 + "]" * 1015 + "}\n")
    train, _ = run("pretrain", tokenizer, tmp_path / "a.jsonl", tmp_path / "out")
    assert train["bad"] == {"no text in the field 'text'": 1}


def test_a_reject_without_a_record_quotes_nothing(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,一\n2,二\n3,"三\n4,四\n')
    train, val = run("pretrain", tokenizer, tmp_path / "a.csv", tmp_path / "out")
    (record,) = map(json.loads, (tmp_path / "out/pretrain_rejects.jsonl").read_text().splitlines())
    assert record["line"] == 4 and "the rest of the file is unread" in record["reason"] and record["record"] == ""


def test_missing_tokenizer_is_reported_before_any_work(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="no tokenizer in"):
        main(
            [
                "pretrain",
                f"--sources={source}",
                f"--tokenizer_path={tmp_path / 'none'}",
                f"--data_path={tmp_path / 'out'}",
            ]
        )
    assert not (tmp_path / "out").exists()
