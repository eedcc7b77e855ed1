"""Every field of OpenAI's API: what asks for nothing passes, and what the server cannot do is a 400 that names it."""

import json

import httpx2 as httpx
import openai
import pytest
from openai.types import completion_create_params as completions_api
from openai.types.chat import completion_create_params as chat_api

from engine.serving.schemas import ChatCompletionRequest, CompletionRequest, RequestMessage
from tests.support.server import NAME, serving

HELLO = [{"role": "user", "content": "背一首春晓"}]
CHAT = ("/v1/chat/completions", {"messages": HELLO}, ChatCompletionRequest, chat_api)
TEXT = ("/v1/completions", {"prompt": "春眠"}, CompletionRequest, completions_api)
SETTINGS = {"model": NAME, "max_tokens": 4, "seed": 5}
FUNCTION = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def post(server, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(server.url + path, headers={"Content-Type": "application/json"}, content=content)


def answers(server, path, body):
    """The texts of the choices."""
    got = post(server, path, SETTINGS | body)
    assert got.status_code == 200, (body, got.text)
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in got.json()["choices"]]


def refusal(server, path, body):
    got = post(server, path, body)
    assert got.status_code == 400, (body, got.text)
    return got.json()["error"]


# ------------------------------------------------------------------------------------------------ what asks for nothing


@pytest.mark.parametrize("path, ask, schema, api", (CHAT, TEXT))
def test_null_is_absent(server, path, ask, schema, api):
    """In any field of the API, and in unknown fields."""
    fields = api.CompletionCreateParamsNonStreaming.__annotations__
    assert set(fields) > set(ask) | {"stop", "seed", "user"}
    nulls = dict.fromkeys([*fields, *schema.model_fields, *schema.neutral, "no_such_field"])
    plain = answers(server, path, ask)
    assert answers(server, path, nulls | ask | SETTINGS) == plain
    for name in nulls.keys() - ask.keys() - SETTINGS.keys():
        assert answers(server, path, {name: None} | ask) == plain, name


@pytest.mark.parametrize("path, ask, schema, api", (CHAT, TEXT))
def test_every_field_of_the_api_is_known(path, ask, schema, api):
    """It is a field, or one of those that the server takes only where they ask for nothing."""
    fields = set(api.CompletionCreateParamsNonStreaming.__annotations__)
    assert fields <= schema.model_fields.keys() | schema.neutral.keys()


CHAT_NEUTRAL = (
    {"tools": []},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none", "parallel_tool_calls": False},
    {"functions": [], "function_call": "auto"},
    {"function_call": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"logit_bias": {}},
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": 0},
    {"service_tier": "auto"},
    {"service_tier": "default", "store": False, "metadata": {}},
    {"metadata": {"run": "1"}, "user": "u", "safety_identifier": "u", "prompt_cache_key": "k"},
    {"prompt_cache_retention": "in_memory", "prompt_cache_options": {"mode": "implicit"}},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"stream": False, "stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"stream_options": {}},
    {"stream_options": {"include_usage": None}},
    {"stop": []},
    {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0},
    {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1},
    {"top_k": -1},
)
TEXT_NEUTRAL = (
    {"suffix": ""},
    {"best_of": 1},
    {"echo": False},
    {"logprobs": False},
    {"logit_bias": {}, "stop": [], "stream_options": {}},
    {"response_format": {"type": "text"}},
)


@pytest.mark.parametrize("endpoint, fields", [(CHAT, CHAT_NEUTRAL), (TEXT, TEXT_NEUTRAL)])
def test_neutral_fields_change_nothing(server, endpoint, fields):
    path, ask, schema, _ = endpoint
    plain = answers(server, path, ask)
    declared = [{name: value} for name, values in schema.neutral.items() for value in values]
    for field in [*fields, *declared]:
        assert answers(server, path, ask | field) == plain, field


def test_an_answer_is_a_message_of_the_next_turn(server):
    """As the client dumps it, and with the empty fields of other clients."""
    client = server.client()

    def ask(messages):
        return client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=6).choices[0]

    message = ask(HELLO).message
    with client.chat.completions.stream(model=NAME, messages=HELLO, temperature=0, max_tokens=6) as stream:
        for _ in stream:
            pass
        streamed = stream.current_completion_snapshot.choices[0].message
    plain = {"role": "assistant", "content": message.content}
    turn = {"role": "user", "content": "谁写的"}
    expected = ask([*HELLO, plain, turn]).message.content
    assert message.model_dump() != plain  # it has null fields
    for again in (
        message.model_dump(),
        message.model_dump(exclude_none=True),
        message.to_dict(),
        message,
        streamed.model_dump(),
        plain | {name: value for name, values in RequestMessage.neutral.items() for value in values},
        plain | {"tool_calls": [], "annotations": [], "refusal": "", "name": None, "audio": None},
        plain | {"content": [{"type": "text", "text": message.content, "annotations": None}]},
    ):
        assert ask([*HELLO, again, turn]).message.content == expected, again


def test_top_p_0_takes_the_likeliest_token(server):
    for path, ask, *_ in (CHAT, TEXT):
        greedy = answers(server, path, ask | {"temperature": 0, "max_tokens": 12})
        assert answers(server, path, ask | {"top_p": 0, "max_tokens": 12}) == greedy
        assert answers(server, path, ask | {"top_p": 0.0, "temperature": 2, "seed": 9, "max_tokens": 12}) == greedy
        assert answers(server, path, ask | {"max_tokens": 12}) != greedy


def test_negative_seeds_are_seeds(server):
    path, ask, *_ = TEXT
    texts = {seed: answers(server, path, ask | {"seed": seed, "max_tokens": 12}) for seed in (-1, -2, 0, 1 - 2**63)}
    assert len({*map(str, texts.values())}) == 4
    for seed, text in texts.items():
        assert answers(server, path, ask | {"seed": seed, "max_tokens": 12}) == text
    assert answers(server, path, ask | {"seed": -2, "n": 3, "max_tokens": 12}) == [
        *texts[-2], *texts[-1], *texts[0]
    ]  # fmt: skip
    for seed in (-(2**63) - 1, 2**63):
        assert refusal(server, path, ask | {"seed": seed})["param"] == "seed"


def test_a_completion_without_a_prompt_begins_a_document(server):
    empty = answers(server, "/v1/completions", {"prompt": ""})
    assert answers(server, "/v1/completions", {}) == answers(server, "/v1/completions", {"prompt": None}) == empty
    assert answers(server, "/v1/completions", {"prompt": [server.tokenizer.bos_id]}) == empty


# --------------------------------------------------------------------------------- what asks for something we cannot do

CHAT_REFUSED = {
    "audio": {"voice": "a", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 10},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [FUNCTION],
    "verbosity": "low",
    "web_search_options": {},
}
TEXT_REFUSED = {"suffix": "end", "best_of": 2, "logit_bias": {"5": 10}, "response_format": SCHEMA}


GENERAL = {"store", "service_tier"}  # tried with /v1/chat/completions


@pytest.mark.parametrize("endpoint, fields", [(CHAT, CHAT_REFUSED), (TEXT, TEXT_REFUSED)])
def test_what_the_server_cannot_do_is_named(server, endpoint, fields):
    path, ask, schema, _ = endpoint
    assert fields.keys() >= schema.neutral.keys() - GENERAL - {"parallel_tool_calls"}  # true and false are neutral
    for name, value in fields.items():
        error = refusal(server, path, ask | {name: value})
        assert error["param"] == name and error["message"].startswith(f"{name}: "), error
        assert "leave it out" in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path, body, message",
    (
        (CHAT, {"stop": ["a"] * 5}, "stop: List should have at most 4 items after validation, not 5"),
        (CHAT, {"stop": [1]}, "stop.0: Input should be a valid string"),
        (CHAT, {"stop": ["a", ""]}, "stop.1: String should have at least 1 character"),
        (CHAT, {"stop": "a" * 129}, "stop: String should have at most 128 characters"),
        (CHAT, {"stop": {"a": 1}}, "stop: Input should be a text or a list of up to 4 texts"),
        (CHAT, {"n": 17}, "n: Input should be less than or equal to 16"),
        (CHAT, {"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        (CHAT, {"messages": {}}, "messages: Input should be a valid list"),
        (CHAT, {"messages": None}, "messages: Field required"),
        (CHAT, {"messages": [None]}, "messages.0: "),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a text or a list"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content: Field required"),
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages.0.content: List should have at least 1"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        (
            CHAT,
            {"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "1"}]},
            "messages.1.role: Input should be 'system', 'developer', 'user' or 'assistant'",
        ),
        (
            CHAT,
            {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [FUNCTION]}]},
            "messages.1.tool_calls: this server cannot do what it asks for",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages.0.content.1.type: Input should be 'text'",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: Input should be 'text'",
        ),
        (CHAT, {"messages": [HELLO[0] | {"wieght": 1}]}, "messages.0.wieght: no field that this server knows"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options: include_usage needs stream: true"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs: needs logprobs: true"),
        (CHAT, {"no_such_field": False}, "no_such_field: no field that this server knows: leave it out"),
        (CHAT, {"store": 0}, "store: "),
        (TEXT, {"prompt": 5}, "prompt: Input should be a text, a list of texts, a list of token ids, or a list of"),
        (TEXT, {"prompt": []}, "prompt: List should have at least 1 item"),
        (TEXT, {"prompt": [1, -2]}, "prompt.1: Input should be greater than or equal to 0"),
        (TEXT, {"prompt": [1, "a"]}, "prompt.1: Input should be a valid integer"),
        (TEXT, {"prompt": [1.5]}, "prompt.0: Input should be a valid integer"),
        (TEXT, {"prompt": [True]}, "prompt.0: Input should be a valid integer"),
        (TEXT, {"prompt": ["a", 1]}, "prompt.1: Input should be a valid string"),
        (TEXT, {"prompt": [[1], [2, "a"]]}, "prompt.1.1: Input should be a valid integer"),
        (TEXT, {"prompt": [[1], []]}, "prompt.1: List should have at least 1 item"),
        (TEXT, {"prompt": "a\ud800"}, "prompt: Input should be a valid string"),
        (TEXT, {"logprobs": True}, "logprobs: Input should be a valid integer"),
        (TEXT, {"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        (TEXT, {"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        (TEXT, {"prompt": ["a"] * 65}, "this server takes at most 64 answers at once, not 65"),
        (TEXT, {"prompt": ["a"] * 5, "n": 16}, "this server takes at most 64 answers at once, not 80"),
        (TEXT, {"best_of": 3, "n": 2}, "best_of: "),
    ),
)
def test_a_400_names_the_true_cause(server, path, body, message):
    error = refusal(server, path[0], path[1] | body)
    assert error["message"].startswith(message), error
    if ": " in message:
        assert error["param"] == message.partition(": ")[0]


@pytest.mark.parametrize(
    "body, message",
    (
        (b"", "the body is empty"),
        (b'"a"', "the body is no JSON object"),
        (b"[]", "the body is no JSON object"),
        (b'{"prompt": "a",}', "the body is no JSON: "),
        (b"{'prompt': 'a'}", "the body is no JSON: Expecting property name enclosed in double quotes at character 1"),
        ('{"prompt": "春"}'.encode("gb18030"), "the body is no JSON in UTF-8"),
        (b"[" * 10**5, "the body is no JSON in UTF-8, or is nested too deeply"),
    ),
)
def test_a_broken_body_is_named(server, body, message):
    assert refusal(server, "/v1/completions", body)["message"].startswith(message)


def test_the_client_shows_the_cause(server):
    with pytest.raises(openai.BadRequestError, match="stop: List should have at most 4") as error:
        server.client().completions.create(model=NAME, prompt="a", stop=["a"] * 5)
    assert error.value.param == "stop"
