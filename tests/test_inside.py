"""What the page shows of an answer from inside, against a plain forward pass; and what is taken away from it."""

import json
import math

import pytest
import torch

from engine.inference.chat import open_speaker
from engine.inference.inspect import expert_loads, is_load, reports_load, thinking
from engine.inference.request import Request
from engine.inference.sampling import Sampling
from tests.support.small_runs import CHAT, small_runs


@pytest.fixture(scope="module", params=["pretrain", "sft"])
def speaker(request):
    return open_speaker(next(small_runs().glob(f"{request.param}_*")), "cpu")


def test_probabilities_are_those_of_a_plain_forward(speaker):
    reply = speaker.answer([{"role": "user", "content": "背一首春晓"}], 40, temperature=1.5, seed=3)
    reply.watch(4)
    parts = []
    for _ in reply:
        parts += reply.spelled(len(parts))  # as the page takes them, while they come
    parts += reply.spelled(len(parts))
    assert parts == reply.spelled() and len(parts) == reply.tokens
    assert "".join(part["text"] for part in parts).replace("·", "") == reply.text
    prompt = len(reply.ids) - reply.tokens
    probs = speaker.model(torch.tensor([reply.ids]))[0][0].softmax(-1)  # (T, V)
    for number, part in enumerate(parts):
        here = probs[prompt + number - 1]
        assert part["p"] == pytest.approx(here[reply.ids[prompt + number]].item(), rel=1e-3, abs=1e-6)
        assert [p for _, p in part["top"]] == pytest.approx(here.topk(4).values.tolist(), rel=1e-3, abs=1e-6)


def test_loads_of_the_tokens_add_up_to_the_load_of_the_text(speaker):
    ids = [speaker.tokenizer.bos_id, *speaker.tokenizer.encode("春眠不觉晓，处处闻啼鸟。")]
    with torch.no_grad():
        whole = {name: value for name, value in speaker.model(torch.tensor([ids]))[2].items() if is_load(name, value)}
    loads = expert_loads(speaker.model, ids, 0)
    assert loads.keys() == whole.keys() and reports_load(speaker.model) == bool(whole)
    for name, load in loads.items():
        assert len(load) == len(ids) and torch.equal(load.sum(0), whole[name])
        assert torch.equal(expert_loads(speaker.model, ids, 5)[name], load[5:])  # the prompt is read in one pass
        assert (load.sum(2) == load[0, 0].sum()).all()  # each token takes as many experts


def test_a_model_without_state_tells_the_load_of_the_whole_text():
    class Plain(torch.nn.Linear):
        def accepts(self, name):
            return False

        def forward(self, ids):
            return None, None, {"moe/load_of_a_kind": torch.full((1, 2), ids.numel()), "load": torch.ones(3), "x": ids}

    loads = expert_loads(Plain(1, 1), [1, 2, 3], 2)
    assert list(loads) == ["moe/load_of_a_kind"] and loads["moe/load_of_a_kind"].tolist() == [[[3, 3]]]


@pytest.mark.parametrize(
    "written, expected",
    (
        (["<think>", "why", "</think>", "so"], ("why", "so")),
        (["<think>", "why"], ("why", "")),  # still at it
        (["why", "</think>", "so"], ("why", "so")),  # its prompt began to think
        (["so"], ("", "so")),
    ),
)
def test_thinking_is_told_apart(written, expected):
    tokenizer = open_speaker(next(small_runs().glob("sft_*")), "cpu").tokenizer
    special = {"<think>": tokenizer.think_id, "</think>": tokenizer.end_think_id}
    for as_text in (False, True) if written[0] != "why" else (False,):
        request = Request([1], 100, Sampling(), tokenizer=tokenizer)
        request.start(100, tokenizer.vocab_size, "cpu")
        for word in written:
            for token in [special[word]] if word in special and not as_text else tokenizer.encode(word):
                request.accept(token)
        assert thinking(tokenizer, request) == expected


def test_export():
    from web.export import as_jsonl, as_markdown

    exchanges = [
        {"ask": "春\n晓", "answers": [{"content": "a"}, {"error": "too long"}]},
        {"ask": "# <b>x</b>", "answers": [{"content": "b\x1b[31m\n- c"}, {"content": "d"}]},
    ]
    first, second = map(json.loads, as_jsonl(["one", "two"], exchanges, "be brief").splitlines())
    assert [m["content"] for m in first["messages"]] == ["be brief", "春\n晓", "a", "# <b>x</b>", "b\x1b[31m\n- c"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant"]
    text = as_markdown(["one", "two"], exchanges, "")
    assert "    - c\n" in text and "\x1b" not in text and "    # <b>x</b>\n" in text and "    too long\n" in text
    assert all(line.startswith(("    ", "#")) or not line for line in text.splitlines())


def test_answers_are_as_likely_as_they_were_learned():
    speaker = open_speaker(next(small_runs().glob("sft_*")), "cpu")
    reply = speaker.answer([{"role": "user", "content": "谁写的"}], 50, temperature=0)
    reply.watch(2)
    assert "".join(reply) == CHAT["谁写的"]
    assert math.prod(part["p"] for part in reply.spelled()) > 0.5
