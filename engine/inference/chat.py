"""A conversation with a run: what the terminal and the page share."""

import time

import torch

from engine.distributed.process_group import find_device
from engine.inference.generate import decode, new_request
from engine.inference.inspect import spelled, thinking
from engine.inference.sampling import Sampling
from engine.inference.scheduler import room
from engine.inference.speculative import check_speculative
from engine.runs import registry
from model.kernels.prepare import prepare_for_decoding
from utils.chat_template import encode_chat
from utils.errors import UserError

BASE = "pretrain"  # the stage whose models have seen no conversation
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def talkers(output_path):
    """The trained runs of a folder (`RunInfo`), those that can chat before base models, newest first."""
    return sorted(registry.find_runs(output_path), key=lambda run: run.stage == BASE)  # a stable sort


def choose_run(output_path):
    """The path of the run to talk to when none is named; UserError when there is none."""
    runs = talkers(output_path)
    if not runs:
        raise UserError(
            f"no trained run in {output_path}: train one with `python pretrain.py` and `python sft.py`, "
            "or pass --run DIR"
        )
    return runs[0].path


def open_speaker(path, device="auto", precision="fp32", compile=False, speculative="", rows=1):
    """Load the run at `path` and make it ready to talk; UserError when there is nothing to load.

    precision: of the weights; int8: those of the matrices, and bf16 for all else. compile: a compiled decode step, for
    `rows` answers at once. speculative: of the answers, as `decode`.
    """
    run = registry.load_run(path, device=find_device(device), dtype=DTYPES[precision])
    model = run.model
    if precision != "fp32":
        check_types(model, precision)
    model.reader = prepare_for_decoding(model, precision, compile, rows)
    if speculative:
        check_speculative(model, speculative)
    return Speaker(model, run.tokenizer, run.config["stage"], speculative, run)


@torch.inference_mode()
def check_types(model, precision):
    """UserError for a model that computes in fp32 with a weight that it takes as it is, of whatever type that is."""
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    except RuntimeError as error:
        if "same dtype" not in str(error):
            raise
        raise UserError(
            f"this model does not run with --precision={precision} ({error}): where its forward computes "
            "in fp32 it must say weight.float(); or use --precision=fp32"
        ) from error


class Speaker:
    """A loaded run that answers: the next turn of a chat, or, from a base model, the rest of a text."""

    def __init__(self, model, tokenizer, stage, speculative="", run=None):
        self.model, self.tokenizer, self.speculative = model, tokenizer, speculative
        self.run = run  # its LoadedRun, where it came from one
        self.is_base = stage == BASE  # it has seen no conversation yet

    def answer(self, messages, max_new_tokens, **sampling):
        """A `Reply` to messages [{"role", "content"}, ...], the last of them the user's; UserError if it cannot fit.

        A base model goes on from the last message and sees none of the others.
        """
        if self.is_base:
            ids, dropped = [self.tokenizer.bos_id] + self.tokenizer.encode(messages[-1]["content"]), 0
        else:
            ids, dropped = fit(self.tokenizer, messages, self.model.args.max_seq_len, max_new_tokens)
        return Reply(self.model, self.tokenizer, ids, max_new_tokens, Sampling(**sampling), dropped, self.speculative)

    def check(self, max_new_tokens, **sampling):
        """UserError when a setting is out of its range."""
        room(self.model, [0], max_new_tokens)
        Sampling(**sampling)


class Reply:
    """An answer while it is written: iterate over its pieces of text. Its fields are right at any moment."""

    def __init__(self, model, tokenizer, ids, max_new_tokens, sampling, dropped=0, speculative=""):
        self.text = ""  # all pieces so far
        self.tokens = 0  # tokens so far
        self.seconds = 0.0  # from the call to the latest token
        self.first_seconds = 0.0  # from the call to the first token: reading the prompt
        self.finish = "stopped"  # "stop": the model ended it; "length": no room left; "stopped": by the reader
        self.dropped = dropped  # messages left out because they did not fit
        room(model, ids, max_new_tokens)
        self._speculative = speculative
        self._tokenizer = tokenizer
        self._model, self._request = model, new_request(tokenizer, ids, max_new_tokens, sampling, text=True)

    def __iter__(self):
        request, start = self._request, time.perf_counter()
        for _ in decode(self._model, [request], self._speculative):
            if len(request.tokens) > self.tokens:
                self.tokens = len(request.tokens)
                self.seconds = time.perf_counter() - start
                self.first_seconds = self.first_seconds or self.seconds
            piece = request.text[len(self.text) :]
            if piece:
                self.text += piece
                yield piece
            self.finish = request.finish or self.finish

    def watch(self, n_top):
        """Before it is iterated over: note the n_top likeliest tokens beside each that is chosen, for `spelled`."""
        self._request.top_logprobs = n_top

    @property
    def ids(self):
        """The tokens of the prompt and of the answer so far."""
        return [*self._request.ids, *self._request.tokens]

    def spelled(self, start=0):
        """The tokens from number `start` on, with what else could have come (engine/inference/inspect.py)."""
        return spelled(self._tokenizer, self._request, start)

    def parts(self):
        """(what was thought, what is said): the text so far."""
        return thinking(self._tokenizer, self._request)

    def figures(self):
        """What to tell below the answer, without the model: tokens, tokens_per_s, first_seconds, finish, dropped; of a
        speculating one also calls of the model, guesses, and hits among them.

        tokens_per_s counts from the call, so the reading of the prompt is in it.
        """
        speculation = (
            {name: getattr(self._request, name) for name in ("calls", "guesses", "hits")} if self._speculative else {}
        )
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return {
            **speculation,
            "tokens": self.tokens,
            "tokens_per_s": rate,
            "first_seconds": self.first_seconds,
            "finish": self.finish,
            "dropped": self.dropped,
        }


def fit(tokenizer, messages, max_seq_len, max_new_tokens):
    """Encode a conversation so that an answer fits: (ids, number of messages left out).

    The oldest turns go first; the system prompt and the last message stay. A quarter of the sequence is kept free for
    the answer, or less when less is asked for. UserError when even the last message alone leaves no room.
    """
    reserve = min(max_new_tokens, max_seq_len // 4)
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, total = messages[len(system) :], len(messages)
    while True:
        ids, _ = encode_chat(tokenizer, system + turns, add_generation_prompt=True)
        later = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        if len(ids) + reserve <= max_seq_len or not later:
            break
        turns = turns[later[0] :]
    if len(ids) >= max_seq_len:
        raise UserError(
            f"the message has {len(ids)} tokens with its system prompt, and the model takes {max_seq_len}, "
            "answer included: shorten it"
        )
    return ids, total - len(system) - len(turns)
