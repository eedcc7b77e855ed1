"""Schemas of the HTTP API: OpenAI's request and response objects, as far as they are supported.

An unknown request field is refused, not ignored: a response without the tools or the format that the client asked for
would look like one with them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.inference.options import SAMPLING

MAX_CHOICES = 16  # per request
MAX_TEXT_CHARS = 2**20  # the limit on the body is the one that counts in practice


def list_field(max_length: int) -> Any:
    """Field of a list that stops at its first invalid item, to bound the size of the error."""
    return Field(min_length=1, max_length=max_length, fail_fast=True)


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], list_field(MAX_TEXT_CHARS)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]


# ---------------------------------------------------------------------------------------------------------- requests


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_field(cls, value: Any) -> Any:
        """Report the first unknown field only: pydantic would list them all."""
        if isinstance(value, dict) and (unknown := next((key for key in value if key not in cls.model_fields), None)):
            raise ValueError(f"{unknown[:64]!a} is no field that this server knows: leave it out")
        return value


class StreamOptions(StrictModel):
    include_usage: bool = Field(False, description="a last chunk reports the numbers of tokens")


class GenerationRequest(StrictModel):
    """Fields that both kinds of request share. The server's settings are the defaults of the sampling fields."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="as in /v1/models")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="choices; the i-th has seed + i")
    max_tokens: TokenCount | None = None
    stop: StopString | Annotated[list[StopString], list_field(4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="accepted and not used")
    # Not in OpenAI's API; named as other servers name them.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None

    @model_validator(mode="after")
    def check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
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
        """The sampling settings that this request sets itself."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}

    def n_top_logprobs(self) -> int | None:
        """The number of alternatives reported per token; None without log-probabilities."""
        raise NotImplementedError

    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(StrictModel):
    type: Literal["text"]
    text: Text


class RequestMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], list_field(256)]
    name: Annotated[str, Field(max_length=64)] | None = Field(None, description="accepted and not used")

    def to_dict(self) -> dict[str, str]:
        """The message for the chat template; `developer` is OpenAI's newer name of `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[RequestMessage], list_field(2048)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="needs logprobs: true")

    @model_validator(mode="after")
    def check_fields_agree(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        return self

    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def n_top_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | Annotated[list[Text], list_field(MAX_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], list_field(MAX_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="alternatives reported per token")

    def n_top_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids; all are of one kind."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)


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
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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
