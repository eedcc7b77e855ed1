"""Chat examples as people publish them: what is next to the text, nulls, other layouts, and what cannot be read."""

import csv
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from preprocess_data.pipeline import prepare as prepare_module
from preprocess_data.preprocess_data import main
from preprocess_data.readers import records
from preprocess_data.readers.chat import ChatExample, to_messages
from tests.support.make_tokenizer import make_tokenizer
from tests.support.texts import write_lines

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "b"}
CHAT = [USER, ANSWER]
NAN = float("nan")


def answer(**fields) -> dict:
    """A record with an answer that has other fields."""
    return {"messages": [USER, {**ANSWER, **fields}]}


def contents(record) -> list[str]:
    return [message["content"] for message in to_messages(record).messages]


def learned(record) -> list[bool]:
    """Whether each answer carries loss."""
    return [message.get("loss", True) for message in to_messages(record).messages if message["role"] == "assistant"]


OFF = [
    answer(weight=0),
    answer(weight=0.0),
    answer(weight="0"),
    answer(weight=-1.0),
    answer(loss=False),
    answer(loss_mask=0),
    answer(loss_scale=0.0),
    answer(step_loss_mask=0),
    answer(train=False),
    answer(training=False),
    answer(train_on_turn=False),
    answer(masked=True),
    answer(train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}]),
    answer(loss=True, weight=0),
    {"messages": CHAT, "weight": 0},
    {"messages": CHAT, "train": False},
    {"messages": CHAT, "loss_mask": [1, 0]},
    {"messages": CHAT, "loss_mask": [0]},
    {"messages": CHAT, "loss_mask": "[0, 0]"},
    {"messages": CHAT, "metadata": {"train_turns": [True, False]}},
    {"messages": CHAT, "masked": [False, True]},
    {"messages": CHAT, "label": False},
    {"prompt": "q", "completion": "b", "label": False},
    {"prompt": "q", "completion": "b", "kto_tag": False},
    {"instruction": "q", "output": "b", "weight": "0.0"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "weight": 0}]},
    {"conversation": [{"human": "q", "assistant": "b", "loss": False}]},
]
ON = [
    answer(weight=1),
    answer(weight=1.0, loss=True, masked=False, train="true"),
    answer(weight=None),
    answer(weight=NAN),
    answer(weight=""),
    answer(train_detail=[{"begin_offset": 0, "end_offset": 0, "train": True}]),
    {"messages": [{**USER, "weight": 0, "loss": False, "masked": True, "step_loss_mask": 0}, ANSWER]},
    {"messages": CHAT, "label": True},
    {"messages": CHAT, "label": 0},
    {"messages": CHAT, "loss_mask": [0, 1]},
    {"messages": CHAT, "loss_mask": [None, None]},
    {"messages": CHAT, "loss_mask": []},
    {"messages": CHAT, "mask": "User"},
    {"messages": CHAT, "train_turns": None, "metadata": {"train_turns": None, "source": "x"}},
]


@pytest.mark.parametrize("record", OFF)
def test_an_answer_whose_loss_is_switched_off_is_not_learned(record):
    assert learned(record) == [False] and contents(record) == ["q", "b"]


@pytest.mark.parametrize("record", ON)
def test_switches_that_are_on_change_nothing(record):
    assert to_messages(record) == ChatExample(CHAT)


def test_a_list_of_switches_has_one_per_turn_of_the_conversation_or_per_answer():
    turns = [USER, ANSWER, USER, ANSWER]
    for flags in ([0, 0, 0, 1], [0, 1], [1, 0, 1, 1]):
        assert learned({"messages": turns, "loss_mask": flags}) == [False, True]
        assert learned({"messages": turns, "system": "s", "loss_mask": flags}) == [False, True]
    assert learned({"messages": [{"role": "system", "content": "s"}, *turns], "loss": [0, 0, 1, 0, 0]}) == [True, False]
    assert learned({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "weight": 1}) == [False, True]
    assert learned({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "weight": 0}) == [False, False]


@pytest.mark.parametrize(
    "record,unread",
    [
        (answer(weight=0.5), {"weight other than 0 and 1"}),
        (answer(weight="high"), {"weight other than 0 and 1"}),
        ({"messages": CHAT, "weight": 2.0}, {"weight other than 0 and 1"}),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, {"tools"}),
        ({"messages": CHAT, "tools": '[{"name": "f"}]', "functions": [1], "documents": ["x"]},
         {"tools", "functions", "documents"}),
        ({"messages": [{**USER, "name": "Ann"}, ANSWER]}, {"name"}),
        ({"messages": [{**USER, "train": True}, ANSWER]}, {"loss on a turn that is no answer"}),
        ({"messages": CHAT, "reasoning": "because"}, {"reasoning next to a conversation"}),
        ({"messages": [{**USER, "thinking": "hm"}, ANSWER]}, {"reasoning of the user"}),
        (answer(reasoning=["a", "b"]), {"reasoning"}),
    ],
)  # fmt: skip
def test_fields_that_are_left_out_are_named(record, unread):
    assert to_messages(record) == ChatExample(CHAT, None, frozenset(unread))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []}, {"tools": "[]"}, {"tools": ""}, {"functions": None}, {"images": []}, {"rejected_response": "c"},
        {"id": 3, "name": "a corpus"}, {"reasoning": "on"}, {"reasoning": True}, {"loss": None},
        {"source": "x", "score": NAN, "turns": 2, "data": "2024-01-01"},
        {"chosen": CHAT, "rejected": CHAT},
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_here_are_not_named(fields):
    assert to_messages({"messages": CHAT, **fields}) == ChatExample(CHAT)
    assert to_messages({"instruction": "q", "output": "b", **fields}) == ChatExample(CHAT)


THOUGHT = "<think>\nwhy\nso\n</think>\n\nb"


@pytest.mark.parametrize(
    "record",
    [
        *(answer(**{name: "why\nso"}) for name in ("reasoning_content", "reasoning", "thinking", "thought")),
        answer(reasoning_content="why\nso\n", reasoning=None),
        answer(content=[{"type": "thinking", "thinking": "why\nso"}, {"type": "text", "text": "b"}]),
        answer(content="<think>\nwhy\nso\n</think>\n\nb", reasoning_content="why\nso"),
        answer(content="<think>\nwhy\nso\n</think>\n\nb"),
        {"question": "q", "answer": "b", "reasoning": "why\nso"},
        {"instruction": "q", "output": "b", "think": "why\nso"},
        {"Question": "q", "Complex_CoT": "why\nso", "Response": "b"},
        {"prompt": [USER], "completion": [{**ANSWER, "thinking": "why\nso"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "reasoning": "why\nso"}]},
    ],
)
def test_reasoning_comes_before_the_answer(record):
    assert to_messages(record) == ChatExample([USER, {**ANSWER, "content": THOUGHT}])


def test_reasoning_of_each_turn_and_of_one_that_has_its_own():
    record = {"messages": [USER, {**ANSWER, "thinking": "x"}, USER, ANSWER]}
    assert contents(record) == ["q", "<think>\nx\n</think>\n\nb", "q", "b"]
    found = to_messages(answer(content="<think>own</think>b", reasoning="another"))
    assert found.messages[1]["content"] == "<think>own</think>b"
    assert found.unread == {"reasoning next to that in the text"}


@pytest.mark.parametrize(
    "record,reason",
    [
        (answer(tool_calls=[{"function": {"name": "f"}}]), "tool_calls, which cannot be read"),
        (answer(content=None, tool_calls=[{"function": {"name": "f"}}]), "tool_calls, which cannot be read"),
        (answer(function_call={"name": "f"}), "function_call, which cannot be read"),
        ({"messages": CHAT, "images": ["a.png"]}, "images, which cannot be read"),
        ({"instruction": "q", "output": "b", "image": "a.png"}, "image, which cannot be read"),
        (answer(audio={"id": "x"}), "audio, which cannot be read"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
         "image_url, which cannot be read"),
        (answer(content=[{"type": "tool_use", "input": {}}, {"type": "text", "text": "b"}]),
         "tool_use, which cannot be read"),
        ({"messages": [*CHAT, {"role": "tool", "content": "1"}, ANSWER]}, "a turn of the role tool"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"},
                            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]},
         "a turn of the role function_call"),
        ({"messages": [USER, {"role": "Observation", "content": "1"}, ANSWER]}, "a turn of the role observation"),
        (answer(train_detail=[{"train": False}, {"train": True}]), "train_detail: loss on a part of a turn"),
        (answer(loss_mask=[1, 1, 0]), "loss_mask: loss on a part of a turn"),
        ({"messages": CHAT, "loss_mask": [1, 1, 0]}, "loss_mask: not one per turn"),
        ({"messages": CHAT, "assistant_masks": [0, 0, 1]}, "assistant_masks: which turns carry loss is not clear"),
        (answer(mask=1), "mask: which turns carry loss is not clear"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a preference pair, for another stage than sft"),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
         "a preference pair, for another stage than sft"),
        ({"chosen": CHAT, "rejected": CHAT}, "a preference pair, for another stage than sft"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens, not text"),
        ({"text": "a"}, "a text, for pretrain"),
        (USER, "a turn, not a conversation"),
        ({"prompt": "q"}, "no answer in the row"),
        ({"messages": [USER]}, "no answer in the row"),
        ({"messages": None}, "unknown layout"),
        ({"messages": []}, "no answer in the row"),
        ([], "no answer in the row"),
        ({"messages": "User: q"}, "a conversation as text that is not JSON"),
        ({"messages": "[{'role': 'user', 'content': 'q'}]"}, "a conversation as text that is not JSON"),
        (answer(content=None), "missing or mistyped fields"),
        (answer(content={"content_type": "text", "parts": ["b"]}), "missing or mistyped fields"),
        (answer(content="", thinking="why"), "empty turn"),
        ({"q": None, "a": "b"}, "unknown layout"),
        ({"instruction": "q", "output": "\udcff"}, "not UTF-8"),
        ({"instruction": "q", "output": "春眠".encode("gbk").decode("utf-8", "surrogateescape")},
         "not UTF-8, perhaps GB18030"),
        ([1], "missing or mistyped fields"),
        ("text", "not a chat row"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason_that_names_it(record, reason):
    assert to_messages(record).reason == reason


EMPTY = dict.fromkeys(("messages", "conversations", "conversation", "prompt", "completion", "history", "system",
                       "tools", "input", "context", "weight", "loss_mask", "held_out", "data", "images"))  # fmt: skip
LAYOUTS = [
    {"instruction": "q", "output": "b"},
    {"messages": CHAT},
    {"messages": [{**turn, "from": None, "value": None, "name": None, "tool_calls": None} for turn in CHAT]},
    {"messages": [{"role": None, "content": None, "from": turn["role"], "value": turn["content"]} for turn in CHAT]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "role": None}]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": USER, "completion": ANSWER},
    {"prompt": "q", "completion": [ANSWER]},
    {"prompt": [USER], "completion": "b"},
    {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
    {"messages": json.dumps(CHAT)},
    {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}])},
    {"messages": {"role": ["user", "assistant"], "content": ["q", "b"]}},
    {"conversation": [{"human": "q", "assistant": "b"}]},
    {"conversation": [{"input": "q", "output": "b"}]},
    {"data": ["q", "b"]},
    {"turns": [{"from": "human", "text": "q"}, {"from": "bot", "text": "b"}]},
    {"messages": [["q", "b"]]},
    {"messages": [{"role": "User", "content": [{"type": "text", "text": "q", "image_url": None}]},
                  {"role": "model", "content": [{"type": "output_text", "text": "b"}]}]},
    {"messages": [USER, {"role": "assistant", "content": None, "refusal": "b"}]},
    {"messages": [USER, None, {"role": "assistant", "content": [None, {"type": "text", "text": "b"}]}]},
    {"messages": [USER, {"role": None, "content": None}, ANSWER]},
    {"q": "q", "a": "b", "history": [None, [None, None]]},
    {"problem": "q", "solution": "b"},
    {"Prompt": "q", "Response": "b"},
    {"input": [USER], "output": "b"},
]  # fmt: skip


@pytest.mark.parametrize("empty", [None, NAN])
@pytest.mark.parametrize("record", LAYOUTS)
def test_an_example_is_read_by_what_it_has(record, empty):
    assert to_messages(record) == ChatExample(CHAT)
    assert to_messages({**dict.fromkeys(EMPTY, empty), **record}) == ChatExample(CHAT)
    assert to_messages({**record, **{name: empty for name in EMPTY if name not in record}}) == ChatExample(CHAT)


def test_bare_turns_and_developers():
    assert to_messages(CHAT) == ChatExample(CHAT)
    record = {"messages": [{"role": "developer", "content": "s"}, *CHAT], "system": "unused"}
    assert to_messages(record).messages == [{"role": "system", "content": "s"}, *CHAT]
    assert to_messages({"messages": CHAT, "system_prompt": "s"}).messages[0] == {"role": "system", "content": "s"}


def test_answers_in_a_prompt_are_not_learned():
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert learned(record) == [False, True]
    assert learned({"prompt": "q", "completion": "b", "history": [["q", "b"]]}) == [True, True]


def test_a_prompt_that_is_json_stays_a_text():
    for prompt in ("[1, 2]", '{"role": "admin"}', '[{"a": 1}]', "[", '["x"]'):
        assert contents({"prompt": prompt, "completion": "b"}) == [prompt, "b"]


def test_code_in_an_answer_keeps_its_indentation():
    code = "    if x:\n        return 1"
    assert contents({"q": "q", "a": code + "\n"}) == ["q", code]
    assert contents(answer(content=f"\n\n{code}", thinking="why"))[1] == f"<think>\nwhy\n</think>\n\n{code}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 420)


def prepare(tokenizer, source, out, *flags) -> tuple[dict, list[list[int]], list[list[int]]]:
    """The meta file of the training split, and the ids and masks of its documents."""
    main(["sft", f"--sources={source}", f"--tokenizer_path={tokenizer.path}", f"--data_path={out}", "--workers=1",
          "--max_bad_ratio=1", "--encoder=tokenizers", *flags])  # fmt: skip
    starts = np.load(out / "sft_train.docs.npy")[1:].astype(int)
    parts = (np.split(np.fromfile(out / f"sft_train.{name}", kind), starts) for name, kind in
             (("bin", "<u2"), ("mask.bin", np.uint8)))  # fmt: skip
    meta = json.loads((out / "sft_train.meta.json").read_text())
    return meta, *([part.tolist() for part in split] for split in parts)


def marked(records: list[dict]) -> list[dict]:
    return [{**record, "held_out": False} for record in records]


def test_records_without_loss_are_filtered_and_fields_that_are_left_out_are_counted(tokenizer, tmp_path, capsys):
    tools = {"messages": CHAT, "tools": ["f"]}
    examples = [answer(weight=0), answer(name="x"), tools, tools,
               {"messages": [USER, {**ANSWER, "weight": 0, "content": "old"}, USER, ANSWER]}]  # fmt: skip
    source = write_lines(tmp_path / "a.jsonl", marked(examples))
    meta, ids, masks = prepare(tokenizer, source, tmp_path / "out")
    assert meta["dropped"] == {"no answer with loss": 1} and meta["bad"] == {}
    assert meta["unread"] == {"name": 1, "tools": 2} and meta["documents"] == 4 and meta["characters"] == 4
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: sft: fields that are left out, in so many conversations: 2 tools, 1 name"]
    assert "2 tools, 1 name" in (tmp_path / "out/sft_report.md").read_text()
    written = [token for token, on in zip(ids[3], masks[3], strict=True) if on]
    assert tokenizer.decode(written, skip_special=False) == "b<|im_end|>"


def test_every_reader_gives_the_same_examples_of_rows_with_nulls(tokenizer, tmp_path):
    rows = [
        {"messages": CHAT, "instruction": None, "output": None, "weight": None},
        {"messages": None, "instruction": "q", "output": "b", "weight": 1.0},
        {"messages": None, "instruction": "q", "output": "c", "weight": 0.0},
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps([{**row, "score": NAN} for row in rows]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows({**row, "messages": row["messages"] and json.dumps(row["messages"])} for row in rows)
    found = []
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv"):
        meta, *documents = prepare(tokenizer, tmp_path / name, tmp_path / f"out_{name}")
        assert (meta["documents"], meta["dropped"], meta["bad"]) == (2, {"no answer with loss": 1}, {}), name
        assert "unread" not in meta
        found.append(documents)
    assert all(documents == found[0] for documents in found)


def test_null_in_the_field_of_where_is_absent(tokenizer, tmp_path):
    examples = [{"messages": CHAT, "form": form} for form in ("x", "y", None)] + [{"messages": CHAT}]
    source = write_lines(tmp_path / "a.jsonl", marked(examples))
    meta, ids, _ = prepare(tokenizer, source, tmp_path / "out", "--where=form=x")
    assert len(ids) == 3 and meta["dropped"] == {"not form=x": 1}


def test_an_interrupted_run_over_a_list_resumes_exactly(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "CHUNK_BYTES", 500)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", -1)
    kinds = [answer(name="x"), answer(weight=0), answer(tool_calls=[1]), {"q": "q", "a": "b", "thinking": "c"}]
    source = tmp_path / "a.json"
    source.write_text(json.dumps({"data": marked([{**kinds[i % 4], "id": i} for i in range(80)])}, indent=1))
    expected = prepare(tokenizer, source, tmp_path / "expected")
    assert expected[0]["unread"] == {"name": 20} and expected[0]["dropped"] == {"no answer with loss": 20}
    add = prepare_module.PrepareRun.add
    chunks = []

    def interrupted(run, chunk, *others):
        chunks.append(chunk)
        if len(chunks) == 5:
            raise KeyboardInterrupt
        add(run, chunk, *others)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.PrepareRun, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tokenizer, source, tmp_path / "out")
    capsys.readouterr()
    assert prepare(tokenizer, source, tmp_path / "out") == expected
    assert "resuming after" in capsys.readouterr().out
    rejects = [(tmp_path / out / "sft_rejects.jsonl").read_text() for out in ("expected", "out")]
    assert rejects[0] == rejects[1] and [json.loads(line)["line"] for line in rejects[0].splitlines()][:2] == [3, 7]
