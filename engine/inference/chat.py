"""One chat model for the terminal, the page and the server: a loaded run, its prompts, its worker, its answers."""

import queue
import time
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.distributed.process_group import find_device
from engine.inference import inspect
from engine.inference.batch import DecodeStep
from engine.inference.compiling import CannotCompile, CompilingStep
from engine.inference.generate import new_request
from engine.inference.options import check_speculative_name
from engine.inference.request import Request
from engine.inference.sampling import Sampling
from engine.inference.scheduler import Scheduler, max_completion_tokens
from engine.inference.speculative import SpeculativeScheduler, check_speculative
from engine.inference.worker import BatchWorker
from engine.runs import registry
from engine.runs.registry import LoadedRun, RunInfo
from model.basemodel import BaseModel
from model.kernels.prepare import compile_in_process, prepare_for_decoding
from utils.chat_template import encode_chat
from utils.errors import UserError
from utils.log import warn
from utils.tokenizer import Tokenizer

BASE = "pretrain"  # the stage of base models, which have seen no conversation
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def chat_runs(output_path: str | Path) -> list[RunInfo]:
    """Return the trained runs of a folder, fine-tuned runs before base models, newest first."""
    return sorted(registry.find_runs(output_path), key=lambda run: run.stage == BASE)  # a stable sort


def choose_run(output_path: str | Path) -> Path:
    """Return the path of the first of `chat_runs`; UserError when there is none."""
    runs = chat_runs(output_path)
    if not runs:
        raise UserError(
            f"no trained run in {output_path}: train one with `python pretrain.py` and `python sft.py`, "
            "or pass --run DIR"
        )
    return runs[0].path


def open_chat_model(
    run: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    compile: str = "false",
    speculative: str = "",
    slots: int = 1,
    max_queue: int | None = None,
) -> "ChatModel":
    """Load the run in folder `run` and prepare it for decoding; UserError when it cannot be loaded.

    precision: of the weights; int8: of the matrices, the rest in bf16. compile: "true", the decode step is compiled
    before the first answer; "auto", while it answers; "cached", if it has been compiled before; "false".
    speculative: "draft" or "ngram", for one slot. slots: requests that are answered at once. max_queue: requests that
    may wait.
    """
    check_speculative_name(speculative)
    loaded = registry.load_run(run, device=find_device(device), dtype=DTYPES[precision])
    if speculative:  # before the decode step is compiled, which takes a while
        check_speculative(loaded.model, speculative)
    if precision != "fp32":
        check_dtypes(loaded.model, precision)
    return ChatModel(loaded, make_decode_step(loaded, precision, compile, slots), speculative, slots, max_queue)


def make_decode_step(run: LoadedRun, precision: str, compile: str, slots: int) -> DecodeStep:
    """Return the decode step of a run, compiled as `compile` of `open_chat_model` says."""
    has_state = run.model.accepts("state")
    if compile == "true" and not has_state:
        warn("--compile does nothing here: this model keeps no state, so it has no decode step to compile")
    on_cpu = next(run.model.parameters()).device.type == "cpu"
    if compile == "false" or not has_state or not on_cpu:
        return prepare_for_decoding(run.model, precision, compile == "true", slots)
    build = {"true": "at once", "auto": "if used", "cached": "never"}[compile]
    plain = prepare_for_decoding(run.model, precision)
    step = CompilingStep(plain, run.config["model_name"], run.config["model"], slots, build)
    if compile != "true":
        step.start()
        return step
    try:
        step.finish()
    except CannotCompile as problem:
        warn(f"compiled in this process, and at every start: it cannot be done ahead of time ({problem})")
        return compile_in_process(run.model, plain, slots)
    return step


@torch.inference_mode()
def check_dtypes(model: BaseModel, precision: str) -> None:
    """Raise UserError for a model that multiplies fp32 activations by a weight of lower precision."""
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except RuntimeError as error:
        if "same dtype" not in str(error):
            raise
        raise UserError(
            f"this model does not run with --precision={precision} ({error}): where its forward computes "
            "in fp32 it must use weight.float(); or use --precision=fp32"
        ) from error


class ChatModel:
    """A loaded run that answers: the next turn of a chat or, if it is a base model, the continuation of a text.

    All answers come from one `worker`. A slot keeps the tokens of its last turn, so that the next turn of the same
    conversation prefills only what is new. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        run: LoadedRun,
        decode_step: DecodeStep | None = None,
        speculative: str = "",
        slots: int = 1,
        max_queue: int | None = None,
    ) -> None:
        """decode_step: a faster forward, as `prepare_for_decoding` returns it. The rest as in `open_chat_model`."""
        self.run = run
        self.model: BaseModel = run.model
        self.tokenizer: Tokenizer = run.tokenizer
        self.speculative = speculative
        self.is_base = run.config["stage"] == BASE
        scheduler: Scheduler
        if speculative:
            scheduler = SpeculativeScheduler(self.model, speculative, max_queue=max_queue, decode_step=decode_step)
        else:
            scheduler = Scheduler(self.model, slots, max_queue=max_queue, decode_step=decode_step)
        self.worker = BatchWorker(scheduler)
        self._finalizer = weakref.finalize(self, close, self.worker, decode_step)  # also when a cache drops the model

    def close(self) -> None:
        """Stop the worker; its requests end as cancelled."""
        self._finalizer()

    def __enter__(self) -> "ChatModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def reports_expert_load(self) -> bool:
        """Whether the model reports the load of its experts (engine/inference/inspect.py)."""
        return inspect.reports_expert_load(self.model)

    @property
    def stop_ids(self) -> set[int]:
        """Return the ids that end an answer; a base model has not been trained on those of our chats."""
        return self.tokenizer.end_ids if self.is_base else self.tokenizer.stop_ids

    def text_ids(self, text: str) -> list[int]:
        """Return the prompt of a text that the model is to continue: `<s>` and the text."""
        return self.tokenizer.encode_prompt(text)

    def prompt_ids(self, messages: list[dict[str, str]], max_new_tokens: int | None = None) -> tuple[list[int], int]:
        """Return the prompt of messages [{"role", "content"}, ...] and the number of messages left out.

        A base model gets the last message as text. A chat gets the chat template; with `max_new_tokens`, the oldest
        turns are left out until such an answer fits (`fit_conversation`).
        """
        if self.is_base:
            return self.text_ids(messages[-1]["content"]), 0
        if max_new_tokens is None:
            return encode_chat(self.tokenizer, messages, add_generation_prompt=True)[0], 0
        return fit_conversation(self.tokenizer, messages, self.model.args.max_seq_len, max_new_tokens)

    def generate(self, messages: list[dict[str, str]], max_new_tokens: int, **sampling: Any) -> "Generation":
        """Return the answer to messages, the last of them the user's; it is generated while it is iterated over.

        sampling: the fields of `Sampling`. UserError for a setting out of bounds or a prompt that does not fit.
        """
        ids, dropped = self.prompt_ids(messages, max_new_tokens)
        max_completion_tokens(self.model, ids, max_new_tokens)
        request = new_request(self.tokenizer, ids, max_new_tokens, Sampling(**sampling), self.stop_ids, text=True)
        return Generation(self, request, dropped)


def close(worker: BatchWorker, decode_step: DecodeStep | None) -> None:
    """Stop the worker, and a build of the decode step."""
    if isinstance(decode_step, CompilingStep):
        decode_step.close()
    worker.close()


class Update(NamedTuple):
    """A snapshot of a request after a step of the scheduler."""

    n_tokens: int
    text: str
    finish: str | None
    at: float  # time.perf_counter()


class Generation:
    """One answer: iterate over its pieces of text. Between two pieces all fields are those of the latest piece."""

    def __init__(self, chat_model: ChatModel, request: Request, dropped: int = 0) -> None:
        self.text = ""
        self.tokens = 0  # number of tokens
        self.seconds = 0.0  # from the call to the latest token
        self.first_seconds = 0.0  # from the call to the first token: the prefill
        self.finish = "stopped"  # "stop": by the model; "length": no room left; "stopped": by the reader
        self.dropped = dropped  # messages left out because they did not fit
        self._chat_model = chat_model  # which lives, and so keeps its worker, until the answer has ended
        self._request = request
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        request.notify = self._notify
        request.reraise = True

    def _notify(self) -> None:
        """In the worker's thread, between two steps."""
        request = self._request
        self._updates.put(Update(len(request.tokens), request.text, request.finish, time.perf_counter()))

    def __iter__(self) -> Iterator[str]:
        start = time.perf_counter()
        try:
            self._chat_model.worker.submit(self._request)
            finish = None
            while finish is None:
                n_tokens, text, finish, at = self._updates.get()
                if finish == "error":
                    raise self._request.exception or UserError(self._request.error)
                if n_tokens > self.tokens:
                    self.tokens = n_tokens
                    self.seconds = at - start
                    self.first_seconds = self.first_seconds or self.seconds
                piece = text[len(self.text) :]
                if piece:
                    self.text = text
                    yield piece
            if finish in ("stop", "length"):
                self.finish = finish
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop generating; from any thread, and without effect on an answer that has ended."""
        self._request.cancelled = True

    def request_logprobs(self, n_top: int) -> None:
        """Before the iteration: record the n_top likeliest alternatives of each token, for `token_details`."""
        self._request.top_logprobs = n_top

    @property
    def ids(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return [*self._request.ids, *self._request.tokens[: self.tokens]]

    def token_details(self, first: int = 0) -> list[dict[str, Any]]:
        """Return the tokens from index `first` on, with their probabilities (engine/inference/inspect.py)."""
        return inspect.token_details(
            self._chat_model.tokenizer, self._answer_ids(), self._request.logprobs, self._starts(), self.text, first
        )

    def split_reasoning(self) -> tuple[str, str]:
        """Return the text so far as (reasoning, reply)."""
        return inspect.split_reasoning(self._chat_model.tokenizer, self._answer_ids(), self._starts(), self.text)

    def stats(self) -> dict[str, Any]:
        """Return tokens, tokens_per_s, first_seconds, finish and dropped; with speculation also forward_passes, drafted
        and accepted.

        tokens_per_s counts from the call, so it includes the prefill.
        """
        request = self._request
        speculation = {
            "forward_passes": request.forward_passes,
            "drafted": request.drafted,
            "accepted": request.accepted,
        }
        return {
            **(speculation if self._chat_model.speculative else {}),
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0,
            "first_seconds": self.first_seconds,
            "finish": self.finish,
            "dropped": self.dropped,
        }

    def _answer_ids(self) -> list[int]:
        return self._request.tokens[: self.tokens]

    def _starts(self) -> list[int]:
        assert self._request.detokenizer is not None
        return self._request.detokenizer.starts[: self.tokens]


def fit_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, str]], max_seq_len: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """Encode a conversation so that an answer fits: (ids, number of messages left out).

    The oldest turns go first; the system prompt and the last message stay. A quarter of the sequence is reserved for
    the answer, or less if `max_new_tokens` is less. What is left may still be too long: `max_completion_tokens` checks.
    """
    reserve = min(max_new_tokens, max_seq_len // 4)
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while True:
        ids, _ = encode_chat(tokenizer, system + turns, add_generation_prompt=True)
        later = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        if len(ids) + reserve <= max_seq_len or not later:
            return ids, len(messages) - len(system) - len(turns)
        turns = turns[later[0] :]
