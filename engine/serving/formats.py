"""What a client gets: OpenAI's objects, as a whole or in chunks, made from requests of the batch."""

from bisect import bisect_left
from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """A prompt counts once, however many answers it has; cached_tokens of it were known from a turn before."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class Token(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    content: list[Token]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: Delta | None = None  # of a whole answer
    delta: Delta | None = None  # of a chunk
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish | None = None


class Answer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None


class ChatAnswer(Answer):
    choices: list[ChatChoice]


class TextAnswer(Answer):
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mini-llm"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: Error


class News:
    """What is new of one request since it was last asked for: text, and the tokens whose text is in it."""

    def __init__(self, request, tokenizer):
        self.request, self.tokenizer, self.chars, self.tokens = request, tokenizer, 0, 0

    def __call__(self):
        """(text, entries, finish)

        entries: None when no log-probabilities were asked for, else of each token its bytes, its log-probability, the
        [(bytes, log-probability)] of the likeliest, and the number of characters before it.
        """
        finish = self.request.finish  # first: what is read after it is all there is
        text = self.request.text[self.chars :]
        self.chars += len(text)
        starts, cut, first = self.request.writer.starts, self.request.writer.stopped, self.tokens
        self.tokens = len(starts) if finish and not cut else bisect_left(starts, self.chars)
        entries = None
        if self.request.top_logprobs is not None:
            entries = [self._entry(number) for number in range(first, self.tokens)]
        return text, entries, None if finish is None else "stop" if finish == "stop" else "length"

    def _entry(self, number):
        def spelled(token, logprob):
            return self.tokenizer.token_bytes(token), max(logprob, -9999.0)  # JSON has no -inf

        request = self.request
        own, top = request.logprobs[number]
        return (
            *spelled(request.tokens[number], own),
            [spelled(*pair) for pair in top.items()],
            request.writer.starts[number],
        )


def spell(token):
    """A token's bytes as text; when they are no whole character, as bytes: in OpenAI's notation."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(entries):
    def one(token, logprob):
        return {"token": spell(token), "logprob": logprob, "bytes": list(token)}

    return ChatLogprobs(
        content=[
            Token(**one(token, logprob), top_logprobs=[TopToken(**one(*pair)) for pair in top])
            for token, logprob, top, _ in entries
        ]
    )


def text_logprobs(entries):
    return TextLogprobs(
        tokens=[spell(entry[0]) for entry in entries],
        token_logprobs=[entry[1] for entry in entries],
        top_logprobs=[{spell(token): logprob for token, logprob in entry[2]} for entry in entries],
        text_offset=[entry[3] for entry in entries],
    )


class ChatShape:
    """How a chat is told."""

    prefix, object, chunk, answer = "chatcmpl-", "chat.completion", "chat.completion.chunk", ChatAnswer

    @staticmethod
    def opening(index):
        return ChatChoice(index=index, delta=Delta(role="assistant", content=""), logprobs=None, finish_reason=None)

    @staticmethod
    def piece(index, text, entries, finish):
        return ChatChoice(
            index=index,
            delta=Delta(**({"content": text} if finish is None else {})),
            logprobs=chat_logprobs(entries) if entries else None,
            finish_reason=finish,
        )

    @staticmethod
    def whole(index, text, entries, finish):
        return ChatChoice(
            index=index,
            message=Delta(role="assistant", content=text),
            logprobs=None if entries is None else chat_logprobs(entries),
            finish_reason=finish,
        )


class TextShape:
    """How a completion is told."""

    prefix, object, chunk, answer = "cmpl-", "text_completion", "text_completion", TextAnswer

    @staticmethod
    def opening(index):
        return None

    @staticmethod
    def whole(index, text, entries, finish):
        return TextChoice(
            index=index, text=text, finish_reason=finish, logprobs=None if entries is None else text_logprobs(entries)
        )

    piece = whole
