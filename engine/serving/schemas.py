"""Schemas of the HTTP API: OpenAI's request and response objects, as far as they are supported.

A field that asks for what this server cannot do, or that it does not know, is refused and not ignored: a response
without the tools or the format that the client asked for would look like one with them. A field that asks for nothing,
null or its neutral value, is as good as left out.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from engine.inference.options import SAMPLING

MAX_CHOICES = 16  # per prompt
MAX_PROMPTS = 1024  # per request; --max_queue is the limit that counts in practice
MAX_TEXT_CHARS = 2**20  # the limit on the body is the one that counts in practice


def list_field(max_length: int, min_length: int = 1) -> Any:
    """Field of a list that stops at its first invalid item, to bound the size of the error."""
    return Field(min_length=min_length, max_length=max_length, fail_fast=True)


def one_of(kind: Callable[[Any], str | None], expected: str) -> Any:
    """Field of a union whose members have the tags that `kind` gives: an error is about the member that was sent.

    The tags are no identifiers, so that errors can leave them out and keep the names of fields.
    """
    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {expected}")


def text_or_list(value: Any) -> str | None:
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else None


def prompt_kind(value: Any) -> str | None:
    """The kind of a prompt, by its first item."""
    if not isinstance(value, list):
        return text_or_list(value)
    first = value[0] if value else None
    return "some texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "token ids"


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], list_field(MAX_TEXT_CHARS)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
StopStrings = Annotated[
    Annotated[StopString, Tag("a text")] | Annotated[list[StopString], list_field(4, min_length=0), Tag("a list")],
    one_of(text_or_list, "a text or a list of up to 4 texts"),
]
Prompt = Annotated[
    Annotated[Text, Tag("a text")]
    | Annotated[list[Text], list_field(MAX_PROMPTS), Tag("some texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[list[TokenIds], list_field(MAX_PROMPTS), Tag("lists of ids")],
    one_of(prompt_kind, "a text, a list of texts, a list of token ids, or a list of such lists"),
]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
ClientName = Annotated[str, Field(max_length=512)] | None  # a name that a client gives to users, caches, ...
UNUSED = Field(None, description="accepted and not used")


# ---------------------------------------------------------------------------------------------------------- requests


def field_error(field: str, message: str) -> PydanticCustomError:
    """An error about a field, raised in a validator of the object around it; ASCII, as any text may be a key."""
    return PydanticCustomError("field", "{message}", {"field": field, "message": message})


def describe_neutral(schema: dict[str, Any], model: type["StrictModel"]) -> None:
    """Write into a JSON schema what `StrictModel` takes besides its fields."""
    schema["additionalProperties"] = {"type": "null"}
    for name, values in model.neutral.items():
        description = "not supported: takes only what asks for nothing"
        schema["properties"][name] = {"enum": [None, *values], "description": description}


class StrictModel(BaseModel):
    """An object of a request. A field that is null is absent, whatever its name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=describe_neutral)
    # Fields of OpenAI's API that ask for what this server cannot do: {name: the values that ask for nothing}.
    neutral: ClassVar[dict[str, list[Any]]] = {}
    kind_field: ClassVar[str] = ""  # a field of fixed values, on which the other fields depend

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, value: Any) -> Any:
        """Refuse the first field that is left over: pydantic would list them all."""
        if not isinstance(value, dict):
            return value
        given = {name: item for name, item in value.items() if item is not None}
        if cls.kind_field in given and given[cls.kind_field] not in get_args(
            cls.model_fields[cls.kind_field].annotation
        ):
            return {cls.kind_field: given[cls.kind_field]}  # the other fields are those of another kind
        known = {name: item for name, item in given.items() if name in cls.model_fields}
        for name, item in given.items():
            if name not in known and name not in cls.neutral:
                raise field_error(ascii(name[:64])[1:-1], "no field that this server knows: leave it out")
            if name not in known and not any(is_equal(item, neutral) for neutral in cls.neutral[name]):
                raise field_error(name, "this server cannot do what it asks for: leave it out")
        return known


def is_equal(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON: 0 is not false."""
    return type(a) is type(b) and a == b


class StreamOptions(StrictModel):
    neutral: ClassVar = {"include_obfuscation": [False]}

    include_usage: bool | None = Field(None, description="a last chunk reports the numbers of tokens")


class GenerationRequest(StrictModel):
    """Fields that both kinds of request share. The server's settings are the defaults of the sampling fields."""

    neutral: ClassVar = {
        "logit_bias": [{}],
        "response_format": [{"type": "text"}],
        "service_tier": ["auto", "default"],
        "store": [False],
    }

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="as in /v1/models")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="choices; the i-th has seed + i")
    max_tokens: TokenCount | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0: the likeliest token")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: ClientName = UNUSED
    # Not in OpenAI's API; named as other servers name them.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 or -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None

    @model_validator(mode="after")
    def check_stream_options(self) -> "GenerationRequest":
        if self.include_usage() and not self.stream:
            raise field_error("stream_options", "include_usage needs stream: true")
        return self

    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    def n_choices(self) -> int:
        return self.n or 1

    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that this request sets itself, for `Sampling`."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if given.get("top_p") == 0:  # keeps the likeliest token alone
            given |= {"top_p": 1.0, "temperature": 0.0}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if "seed" in given:
            given["seed"] %= 2**63
        return given

    def n_top_logprobs(self) -> int | None:
        """The number of alternatives reported per token; None without log-probabilities."""
        raise NotImplementedError

    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(StrictModel):
    kind_field: ClassVar = "type"

    type: Literal["text"]
    text: Text


class RequestMessage(StrictModel):
    kind_field: ClassVar = "role"
    neutral: ClassVar = {  # an answer comes back with them
        "annotations": [[]],
        "audio": [],
        "function_call": [],
        "reasoning_content": [""],
        "refusal": [""],
        "tool_calls": [[]],
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("a text")] | Annotated[list[TextPart], list_field(256), Tag("a list")],
        one_of(text_or_list, "a text or a list of text parts"),
    ]
    name: Annotated[str, Field(max_length=64)] | None = UNUSED

    def to_dict(self) -> dict[str, str]:
        """The message for the chat template; `developer` is OpenAI's newer name of `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatCompletionRequest(GenerationRequest):
    neutral: ClassVar = GenerationRequest.neutral | {
        "audio": [],
        "function_call": ["none", "auto"],
        "functions": [[]],
        "modalities": [["text"]],
        "moderation": [],
        "parallel_tool_calls": [True, False],
        "prediction": [],
        "prompt_cache_options": [{}, {"mode": "implicit"}, {"mode": "implicit", "ttl": "30m"}],
        "prompt_cache_retention": ["in_memory"],
        "reasoning_effort": ["none"],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "verbosity": ["medium"],
        "web_search_options": [],
    }

    messages: Annotated[list[RequestMessage], list_field(2048)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="needs logprobs: true")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = UNUSED
    prompt_cache_key: ClientName = UNUSED
    safety_identifier: ClientName = UNUSED

    @model_validator(mode="after")
    def check_fields_agree(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise field_error("max_tokens", "the old name of max_completion_tokens: give one of them")
        return self

    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def n_top_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(GenerationRequest):
    neutral: ClassVar = GenerationRequest.neutral | {"suffix": [""]}

    prompt: Prompt | None = Field(None, description="left out: the beginning of a document")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="0: the prompt is only read")
    logprobs: Annotated[int, Field(ge=0, le=20)] | Literal[False] | None = Field(
        None, description="alternatives reported per token"
    )
    echo: bool | None = Field(None, description="the prompt comes first, in the text and in logprobs")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="not supported: must be n")

    @model_validator(mode="after")
    def check_best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n_choices()):
            raise field_error("best_of", "this server returns all answers that it generates: leave it out, or send n")
        return self

    def n_top_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids; all are of one kind."""
        prompt = "" if self.prompt is None else self.prompt
        is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_single else list(prompt)


# --------------------------------------------------------------------------------------------------------- responses

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """A prompt counts once, however many choices it has; `cached_tokens` of it came from a cached prefix."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage | None = None  # in a chat.completion
    delta: AssistantMessage | None = None  # in a chat.completion.chunk
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionLogprobs(BaseModel):
    """`token_logprobs` and `top_logprobs` of a prompt's first token are null: nothing comes before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class GenerationResponse(BaseModel):
    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None


class ChatCompletion(GenerationResponse):
    choices: list[ChatChoice]


class Completion(GenerationResponse):
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mini-llm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthResponse(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorObject
