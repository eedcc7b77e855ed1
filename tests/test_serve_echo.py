"""Log-probabilities of prompts: `echo` in /v1/completions, and lm_eval's local-completions on top of it."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
import torch

from engine.inference import scheduler as scheduler_module
from engine.inference.generate import new_request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import PromptTooLong, Scheduler
from engine.serving.responses import token_text
from tests.support.decoding_models import EVERY, LONGEST, PROMPTS, TOKENIZER, build
from tests.support.foreign_tokenizers import byte_level, save
from tests.support.server import MAX_SEQ_LEN, NAME, make_run, serving
from utils.tokenizer import load_tokenizer

TEXTS = ["春眠不觉晓，处处闻啼鸟。", "hello, 春", "x"]
NEAR = dict(abs=2e-4)


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def complete(server, prompt, **more):
    ask = dict(echo=True, logprobs=2, max_tokens=0) | more
    return server.client().completions.create(model=NAME, prompt=prompt, **ask)


def direct(model, ids):
    """Log-probabilities of the token that follows each of `ids`, without state and batch.  # (T, V)"""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0].float().log_softmax(-1)


def check_figures(server, logprobs, ids, first):
    """That all lists describe ids[first:], by the model's own forward pass."""
    tokenizer, logs = server.tokenizer, direct(server.model, ids)
    assert logprobs.tokens == [token_text(tokenizer.token_bytes(i)) for i in ids[first:]]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for at in range(first + 1, len(ids)):
        row, own, top = logs[at - 1], logprobs.token_logprobs[at - first], logprobs.top_logprobs[at - first]
        assert own == pytest.approx(row[ids[at]].item(), **NEAR)
        likeliest = [*row.topk(2).indices.tolist(), ids[at]]
        expected = {token_text(tokenizer.token_bytes(i)): row[i].item() for i in likeliest}
        assert top == pytest.approx(expected, **NEAR) and list(top.values()) == sorted(top.values(), reverse=True)
        assert (own == max(top.values())) == (row.argmax() == ids[at])  # how clients see a greedy token


def check_offsets(choice):
    """That the offset of every token of complete characters is where its text is."""
    starts, found = choice.logprobs.text_offset, 0
    assert starts == sorted(starts) and len(starts) == len(choice.logprobs.tokens) and starts[:1] in ([], [0])
    for token, start in zip(choice.logprobs.tokens, starts, strict=True):
        if not token.startswith("bytes:") and token not in ("<s>", "</s>", "<|im_end|>"):
            assert choice.text[start : start + len(token)] == token
            found += 1
    return found


# ----------------------------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_and_its_ids_have_the_models_likelihoods(server, text):
    """The server's own <s> is not part of a text; it is if it comes as an id."""
    ids = [server.tokenizer.bos_id, *server.tokenizer.encode(text)]
    answer = complete(server, text)
    choice = answer.choices[0]
    assert choice.text == text and choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    check_figures(server, choice.logprobs, ids, 1)
    assert check_offsets(choice) > 0
    as_ids = complete(server, ids).choices[0]
    assert as_ids.text == text and as_ids.logprobs.tokens[0] == "<s>"
    check_figures(server, as_ids.logprobs, ids, 0)
    assert as_ids.logprobs.token_logprobs[2:] == choice.logprobs.token_logprobs[1:]
    without = complete(server, ids[1:]).choices[0]
    check_figures(server, without.logprobs, ids[1:], 0)


@pytest.mark.parametrize("max_tokens", (0, 1, 6))
def test_batched_prompts_with_choices_and_answers(server, max_tokens):
    """Of texts and of ids; each has the figures that it has alone, and the answer that it has without echo."""
    encoded = [[server.tokenizer.bos_id, *server.tokenizer.encode(text)] for text in TEXTS]
    more = dict(max_tokens=max_tokens, n=2, seed=4)
    for prompts, first in ((TEXTS, 1), (encoded, 0)):
        answer = complete(server, prompts, **more)
        plain = complete(server, prompts, echo=False, **more)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage.completion_tokens == plain.usage.completion_tokens <= 6 * max_tokens
        for choice, other in zip(answer.choices, plain.choices, strict=True):
            ids = encoded[choice.index // 2]
            size = len(ids) - first
            lists = choice.logprobs
            prompt = SimpleNamespace(
                **{name: getattr(lists, name)[:size] for name in ("tokens", "token_logprobs", "top_logprobs")}
            )
            check_figures(server, prompt, ids, first)
            assert choice.text == TEXTS[choice.index // 2] + other.text
            assert choice.finish_reason == other.finish_reason
            assert lists.tokens[size : size + len(other.logprobs.tokens)] == other.logprobs.tokens
            assert lists.token_logprobs[size:][: len(other.logprobs.tokens)] == pytest.approx(
                other.logprobs.token_logprobs, **NEAR
            )
            assert "\ufffd" in choice.text or check_offsets(choice) > 0


def test_the_first_token_of_an_answer_that_ends_at_once_is_listed(server):
    """lm_eval asks for one token and drops the last entry, whatever it is: an end is an entry, too."""
    stop_ids = set(new_request(server.tokenizer, [1], 1, Sampling()).stop_ids)
    rows = torch.cartesian_prod(torch.tensor([1]), torch.arange(300), torch.arange(20, 60))
    with torch.no_grad():
        likeliest = server.model(rows)[0][:, -1].argmax(-1)
    ids = next(row.tolist() for row, token in zip(rows, likeliest.tolist(), strict=True) if token in stop_ids)
    choice = complete(server, ids, max_tokens=1, temperature=0).choices[0]
    assert choice.finish_reason == "stop" and len(choice.logprobs.tokens) == len(ids) + 1
    assert choice.logprobs.tokens[-1] in ("</s>", "<|im_end|>")
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(direct(server.model, ids)[-1].max().item(), **NEAR)
    assert choice.logprobs.text_offset[-1] == len(choice.text)
    plain = complete(server, ids, max_tokens=1, temperature=0, echo=False).choices[0]
    assert plain.text == "" and plain.logprobs.tokens == []


@pytest.mark.parametrize("max_tokens, logprobs", ((0, 1), (5, 3), (5, None)))
def test_a_stream_has_the_prompt_first(server, max_tokens, logprobs):
    ask = dict(max_tokens=max_tokens, logprobs=logprobs, seed=8, n=2)
    chunks = list(complete(server, TEXTS[:2], stream=True, **ask))
    for choice in complete(server, TEXTS[:2], **ask).choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text and mine[0].text.startswith(TEXTS[choice.index // 2])
        assert mine[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            if logprobs is not None:
                joined = [entry for c in mine if c.logprobs for entry in getattr(c.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)


def test_echo_without_log_probabilities_and_without_an_answer(server):
    assert complete(server, "春眠", logprobs=None).choices[0].text == "春眠"
    for prompt in ("", "春眠", [[1, 40], [1, 41, 42]]):
        choice = complete(server, prompt, echo=False).choices[0]  # max_tokens 0: only the prompt is read
        assert choice.text == "" and choice.logprobs.tokens == [] and choice.finish_reason == "length"
    empty = complete(server, "", max_tokens=3, temperature=0).choices[0]
    assert empty.logprobs.token_logprobs[0] == pytest.approx(direct(server.model, [1])[-1].max().item(), **NEAR)


def test_where_nothing_is_put_before_a_text_all_of_it_is_echoed(tmp_path):
    """As with the tokenizers of GPT-2 and SmolLM; an empty text is the token that begins a document."""
    end = "<|endoftext|>"
    tokenizer = load_tokenizer(save(byte_level([end], 290), tmp_path / "theirs", eos_token=end), {"eos_token_id": 0})
    run = replace(make_run(), tokenizer=tokenizer)
    assert tokenizer.prefix_ids == [] and tokenizer.vocab_size <= run.model.args.vocab_size
    with serving(run) as server:
        for prompt in ("hello world", ["ab", "春眠"], ["", "x"]):
            answer = complete(server, prompt)
            for choice, text in zip(answer.choices, [prompt] if isinstance(prompt, str) else prompt, strict=True):
                assert choice.text == text
                check_figures(server, choice.logprobs, tokenizer.encode(text) or [0], 0)
        with pytest.raises(openai.BadRequestError, match=r"begins with <\|endoftext\|>, .* leave it out"):
            complete(server, end + "x")
        assert complete(server, end + "x", logprobs=None).choices[0].text == end + "x"


def test_a_cached_prefix_hides_no_token(server):
    ids = [1, 40, 41, 42, 43]
    before = complete(server, ids)
    complete(server, ids, echo=False, logprobs=None, max_tokens=3)
    again = complete(server, [*ids, 44])
    assert again.usage.prompt_tokens_details.cached_tokens == 0
    assert again.choices[0].logprobs.token_logprobs[1:5] == pytest.approx(
        before.choices[0].logprobs.token_logprobs[1:], **NEAR
    )
    more = complete(server, [*ids, 44, 45], echo=False, max_tokens=1)
    assert more.usage.prompt_tokens_details.cached_tokens > 0  # what was read for an echo can be continued


def test_alternatives_of_one_text_are_the_likeliest(server):
    """The name of a special token may also be the text of others; logprobs=0 lists the token alone."""
    none = complete(server, [1, 40, 41], logprobs=0).choices[0].logprobs
    assert [*map(len, none.top_logprobs[1:])] == [1, 1]
    assert [*none.top_logprobs[1].values()] == none.token_logprobs[1:2]


def test_a_prompt_may_fill_the_model_if_it_is_only_read(server):
    ids = [1] + [40] * (MAX_SEQ_LEN - 1)
    check_figures(server, complete(server, ids).choices[0].logprobs, ids, 0)
    for prompt, max_tokens in ((ids, 1), ([*ids, 40], 0)):
        with pytest.raises(openai.BadRequestError, match=f"{len(prompt)} tokens") as error:
            complete(server, prompt, max_tokens=max_tokens)
        assert error.value.code == "context_length_exceeded"


def test_a_text_that_spells_the_beginning_is_refused(server):
    """lm_eval decodes its ids when tokenized_requests=False: `<s>` would be three ordinary tokens."""
    for prompt in ("<s>春眠", ["x", "<s>"]):
        with pytest.raises(openai.BadRequestError, match="begins with <s>, which is ordinary text here"):
            complete(server, prompt)
    assert complete(server, "<s>春眠", logprobs=None).choices[0].text == "<s>春眠"
    assert complete(server, "春<s>眠").choices[0].text == "春<s>眠"


# ---------------------------------------------------------------------------------------------------- any kind of model


@pytest.mark.parametrize("piece", (3, 512))
@pytest.mark.parametrize("name", EVERY)
def test_prompts_are_scored_in_pieces_beside_others(monkeypatch, name, piece):
    monkeypatch.setattr(scheduler_module, "SCORED_TOKENS", piece)
    model = build(name)
    requests = [
        new_request(TOKENIZER, ids, n, Sampling(0), (), top_logprobs=2, score_prompt=scored)
        for ids, n, scored in zip(PROMPTS, (0, 3, 2, 4, 0), (True, True, True, False, True), strict=True)
    ]
    scheduler = Scheduler(model, n_slots=3)
    scheduler.add(*requests)
    while scheduler.busy:
        scheduler.step()
    for request in requests:
        assert len(request.tokens) == request.max_new_tokens and request.finish == "length"
        logs = direct(model, request.ids + request.tokens)
        known = request.prompt_logprobs + request.logprobs
        first = 0 if request.score_prompt else len(request.ids) - 1
        expected = [logs[at, token].item() for at, token in enumerate((request.ids + request.tokens)[1:])]
        assert [own for own, _ in known] == pytest.approx(expected[first:], abs=1e-3)
    full = new_request(TOKENIZER, [4] * LONGEST, 0, Sampling(), (), top_logprobs=0, score_prompt=True)
    scheduler.add(full)
    scheduler.step()
    assert len(full.prompt_logprobs) == LONGEST - 1 and full.finish == "length"
    with pytest.raises(PromptTooLong):
        scheduler.add(new_request(TOKENIZER, [4] * LONGEST, 1, Sampling(), ()))


def test_a_prompt_with_logits_that_are_not_finite_is_an_error():
    """Also where those of its last token are finite."""
    model = build("no state")
    forward = model.forward

    def broken(ids, *more):
        logits, *rest = forward(ids, *more)
        logits[:, 1] = math.nan
        return logits, *rest

    model.forward = broken
    request = new_request(TOKENIZER, [1, 2, 3, 4], 2, Sampling(), (), top_logprobs=0, score_prompt=True)
    scheduler = Scheduler(model, n_slots=1)
    scheduler.add(request)
    scheduler.step()
    assert request.finish == "error" and "not finite" in request.error


# -------------------------------------------------------------------------------------------------------------- lm_eval

PAIRS = [("春眠不觉晓，", "处处闻啼鸟。"), ("春眠", "不觉晓"), ("hello", " how are you"), ("a", "\nx")]


@pytest.fixture(scope="module")
def lm_eval_api():
    pytest.importorskip("lm_eval")
    return pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI


def expected_pair(server, before, context, continuation):
    """(log-probability of the continuation, whether it is the greedy one), by the model's own forward pass."""
    whole = [*before, *server.tokenizer.encode(context + continuation)]
    n_context = len(before) + len(server.tokenizer.encode(context))
    logs = direct(server.model, whole)[n_context - 1 : -1]
    targets = torch.tensor(whole[n_context:])
    return logs.gather(1, targets[:, None]).sum().item(), bool((logs.argmax(-1) == targets).all())


@pytest.mark.slow
@pytest.mark.parametrize("tokenized", (True, False))
@pytest.mark.parametrize("batch_size, concurrent", ((1, 1), (3, 1), (2, 4)))
def test_likelihoods_by_lm_eval(server, lm_eval_api, tokenized, batch_size, concurrent):
    """With token ids as prompts, which come without <s>, and with texts, before which the server puts it."""
    from lm_eval.api.instance import Instance

    api = lm_eval_api(
        base_url=server.url + "/v1/completions",
        model=NAME,
        tokenizer=str(server.tokenizer.path),
        tokenizer_backend="huggingface",
        tokenized_requests=tokenized,
        batch_size=batch_size,
        num_concurrent=concurrent,
        max_length=MAX_SEQ_LEN,
        max_retries=1,
    )
    bos = server.tokenizer.bos_id
    greedy = server.tokenizer.decode(
        [direct(server.model, [*([] if tokenized else [bos]), *server.tokenizer.encode("春眠")])[-1].argmax().item()]
    )
    pairs = [*PAIRS, ("春眠", greedy)] if greedy.isprintable() and "\ufffd" not in greedy else PAIRS
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (value, is_greedy) in zip(pairs, api.loglikelihood(asked), strict=True):
        expected, expected_greedy = expected_pair(server, [] if tokenized else [bos], *pair)
        assert value == pytest.approx(expected, abs=2e-3), pair
        assert is_greedy == expected_greedy, pair
    if tokenized:  # whole texts, and empty contexts: lm_eval puts <s> first itself
        texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
        for text, value in zip(TEXTS, api.loglikelihood_rolling(texts), strict=True):
            ids = [bos, *server.tokenizer.encode(text)]
            expected = sum(direct(server.model, ids)[at, token].item() for at, token in enumerate(ids[1:]))
            assert value == pytest.approx(expected, abs=2e-3)
        ((value, _),) = api.loglikelihood([Instance("loglikelihood", {}, ("", "春眠"), 0)])
        assert value == pytest.approx(expected_pair(server, [bos], "", "春眠")[0], abs=2e-3)


@pytest.mark.slow
def test_the_command_lm_eval(server, lm_eval_api, tmp_path):
    """`lm_eval --model local-completions` on a task of multiple choices, without network."""
    rows = [
        {"q": "春眠不觉晓，", "choices": ["处处闻啼鸟。", "花落知多少。", "hello"], "gold": 0},
        {"q": "hello", "choices": [" x", " how are you"], "gold": 1},
        {"q": "夜来", "choices": ["风雨声", "春", "鸟鸟", "a b c"], "gold": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "poems.yaml").write_text(f"""
task: poems
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{tmp_path / "rows.jsonl"}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
""")
    arguments = (
        f"model={NAME},base_url={server.url}/v1/completions,tokenizer={server.tokenizer.path},"
        "tokenizer_backend=huggingface"
    )
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "poems",
         "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [json.loads(line) for path in tmp_path.glob("out/**/samples_*.jsonl") for line in open(path)]
    assert len(samples) == len(rows)
    right = 0
    for sample in samples:
        row = rows[sample["doc_id"]]
        figures = [expected_pair(server, [], row["q"], choice)[0] for choice in row["choices"]]
        assert [float(each[0]) for each in sample["filtered_resps"]] == pytest.approx(figures, abs=2e-3)
        right += figures.index(max(figures)) == row["gold"]
    results = json.loads(next(tmp_path.glob("out/**/results_*.json")).read_text())
    assert results["results"]["poems"]["acc,none"] == pytest.approx(right / len(rows))


def test_metrics_count_an_answer_without_tokens(server):
    complete(server, "春")
    page = httpx.get(server.url + "/metrics").text
    assert 'mini_llm_answers_total{finish="length"}' in page
