"""What a client may ask: the fields of OpenAI's API that are answered here, each with its bounds.

A field that is not here is refused, not ignored: an answer without the tools or the format that were asked for would
look like one with them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.inference.options import SAMPLING

MOST_CHOICES = 16  # answers to one request
MOST_TEXT = 2**20  # characters of a text; the body's own bound is what counts in practice


def List(kind, most):
    """A list type that ends at its first mistake: a body has room for a hundred thousand, each with its message."""
    return Annotated[list[kind], Field(min_length=1, max_length=most, fail_fast=True)]


Text = Annotated[str, Field(max_length=MOST_TEXT)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = List(Id, MOST_TEXT)
Stop = Annotated[str, Field(min_length=1, max_length=128)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def known(cls, value):
        """The first field that is not here is enough: pydantic would list them all."""
        if isinstance(value, dict) and (unknown := next((key for key in value if key not in cls.model_fields), None)):
            raise ValueError(f"{unknown[:64]!a} is no field that this server knows: leave it out")
        return value


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk tells how many tokens were read and written")


class Settings(Body):
    """What both kinds of request have. Sampling settings that are left out are those the server was started with."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="as in /v1/models")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(None, description="answers; the i-th has seed + i")
    max_tokens: Tokens | None = None
    stop: Stop | List(Stop, 4) | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="taken and not used")
    # Not in OpenAI's API; named as other servers name them.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None

    @model_validator(mode="after")
    def fit_together(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def longest(self):
        return self.max_tokens

    def stops(self):
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self):
        """The sampling settings that the request has of its own, as a dict."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | List(TextPart, 256)
    name: Annotated[str, Field(max_length=64)] | None = Field(None, description="taken and not used")

    def plain(self):
        """As the chat template takes it: a developer is what was called system before."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Settings):
    messages: List(Message, 2048)
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="needs logprobs: true")

    @model_validator(mode="after")
    def agree(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        return self

    def longest(self):
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def top(self):
        """How many likeliest tokens beside each token's log-probability; None: no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(Settings):
    prompt: Text | List(Text, MOST_CHOICES) | Ids | List(Ids, MOST_CHOICES)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="likeliest tokens beside each token")

    def top(self):
        return self.logprobs

    def prompts(self):
        """The prompts, each a text or a list of token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt
