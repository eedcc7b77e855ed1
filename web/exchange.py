"""The messages and answers of a conversation on the page."""

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch


class Answer(TypedDict, total=False):
    """One run's answer: its text and statistics, or an error."""

    content: str
    reasoning: str  # the text between <think> and </think>
    stats: dict[str, Any]
    tokens: list[dict[str, Any]]  # with probabilities and alternatives (engine/inference/inspect.py)
    ids: list[int]  # of the prompt and the answer
    loads: "dict[str, torch.Tensor]"  # expert load, filled when its view is opened
    error: str


class Exchange(TypedDict):
    """A user's message, and one answer per run."""

    prompt: str
    answers: list[Answer]


def history(exchanges: list[Exchange], number: int, system: str) -> list[dict[str, str]]:
    """The messages that run `number` has seen and answered, after the system prompt if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        answer = exchange["answers"][number]
        if answer.get("content") and "error" not in answer:
            messages += [
                {"role": "user", "content": exchange["prompt"]},
                {"role": "assistant", "content": answer["content"]},
            ]
    return messages
