"""Token probabilities, expert loads and reasoning of an answer, against a plain forward pass; and the export."""

import json
import math

import pytest
import torch

from engine.inference.chat import open_chat_model
from engine.inference.inspect import expert_loads, reports_expert_load, split_reasoning
from engine.inference.request import Request
from engine.inference.sampling import Sampling
from model.basemodel import is_expert_load
from tests.support.small_runs import CHAT, small_runs
from utils.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["pretrain", "sft"])
def chat_model(request):
    with open_chat_model(next(small_runs().glob(f"{request.param}_*")), "cpu") as chat_model:
        yield chat_model


def test_probabilities_are_those_of_a_plain_forward(chat_model):
    generation = chat_model.generate([{"role": "user", "content": "背一首春晓"}], 40, temperature=1.5, seed=3)
    generation.request_logprobs(4)
    parts = []
    for _ in generation:
        parts += generation.token_details(len(parts))  # as the page does, during the generation
    parts += generation.token_details(len(parts))
    assert parts == generation.token_details() and len(parts) == generation.tokens
    assert "".join(part["text"] for part in parts).replace("·", "") == generation.text
    prompt = len(generation.ids) - generation.tokens
    probs = chat_model.model(torch.tensor([generation.ids]))[0][0].softmax(-1)  # (T, V)
    for number, part in enumerate(parts):
        here = probs[prompt + number - 1]
        assert part["p"] == pytest.approx(here[generation.ids[prompt + number]].item(), rel=1e-3, abs=1e-6)
        assert [p for _, p in part["top"]] == pytest.approx(here.topk(4).values.tolist(), rel=1e-3, abs=1e-6)


def test_loads_of_the_tokens_add_up_to_the_load_of_the_text(chat_model):
    ids = [chat_model.tokenizer.bos_id, *chat_model.tokenizer.encode("春眠不觉晓，处处闻啼鸟。")]
    with torch.no_grad():
        full = {
            name: value
            for name, value in chat_model.model(torch.tensor([ids]))[2].items()
            if is_expert_load(name, value)
        }
    loads = expert_loads(chat_model.model, ids, 0)
    assert loads.keys() == full.keys() and reports_expert_load(chat_model.model) == bool(full)
    for name, load in loads.items():
        assert len(load) == len(ids) and torch.equal(load.sum(0), full[name])
        assert torch.equal(expert_loads(chat_model.model, ids, 5)[name], load[5:])  # the prompt is read in one pass
        assert (load.sum(2) == load[0, 0].sum()).all()  # each token takes as many experts


def test_a_model_without_state_reports_the_load_of_the_full_text():
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
        (["<think>", "why"], ("why", "")),  # not finished
        (["why", "</think>", "so"], ("why", "so")),  # the prompt ended with <think>
        (["so"], ("", "so")),
    ),
)
def test_reasoning_is_split_from_the_reply(written, expected):
    tokenizer = load_tokenizer(small_runs() / "tokenizer")
    special = {"<think>": tokenizer.think_id, "</think>": tokenizer.end_think_id}
    for as_text in (False, True) if written[0] != "why" else (False,):
        request = Request([1], 100, Sampling(), tokenizer=tokenizer)
        request.start(100, tokenizer.vocab_size, "cpu")
        for word in written:
            for token in [special[word]] if word in special and not as_text else tokenizer.encode(word):
                request.accept(token)
        starts = request.detokenizer.starts
        assert split_reasoning(tokenizer, request.tokens, starts, request.text) == expected


def test_export():
    from web.export import as_jsonl, as_markdown

    exchanges = [
        {"prompt": "春\n晓", "answers": [{"content": "a"}, {"error": "too long"}]},
        {"prompt": "# <b>x</b>", "answers": [{"content": "b\x1b[31m\n- c"}, {"content": "d"}]},
    ]
    first, second = map(json.loads, as_jsonl(["one", "two"], exchanges, "be brief").splitlines())
    assert [m["content"] for m in first["messages"]] == ["be brief", "春\n晓", "a", "# <b>x</b>", "b\x1b[31m\n- c"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant"]
    text = as_markdown(["one", "two"], exchanges, "")
    assert "    - c\n" in text and "\x1b" not in text and "    # <b>x</b>\n" in text and "    too long\n" in text
    assert all(line.startswith(("    ", "#")) or not line for line in text.splitlines())


def test_learned_answers_are_likely():
    chat_model = open_chat_model(next(small_runs().glob("sft_*")), "cpu")
    generation = chat_model.generate([{"role": "user", "content": "谁写的"}], 50, temperature=0)
    generation.request_logprobs(2)
    assert "".join(generation) == CHAT["谁写的"]
    assert math.prod(part["p"] for part in generation.token_details()) > 0.5
