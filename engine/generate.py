"""Text from a model, by the contract alone: with `state` when the model takes it, else by reading the prefix again."""
import torch

from engine.sampling import Sampling, penalize, pick
from utils.errors import UserError


def generate(model, tokenizer, prompt_ids, max_new_tokens, stop_ids=None, **sampling):
    """Answer a batch of prompts of any lengths: a list of token ids a prompt, without the prompt and the stop token.

    `prompt_ids` is a list of lists of ids; `stop_ids` defaults to the end of a document or of a turn; `sampling`
    takes the fields of `Sampling`. A row ends at a stop token, after max_new_tokens, or when prompt and answer fill
    max_seq_len. Raises UserError for an empty prompt, one that leaves no room, or an id the model does not have.
    """
    answers = [[] for _ in prompt_ids]
    for step in decode(model, prompt_ids, max_new_tokens, _stops(tokenizer, stop_ids), Sampling(**sampling)):
        for row, token in step:
            answers[row].append(token)
    return answers


def stream(model, tokenizer, ids, max_new_tokens, stop_ids=None, **sampling):
    """Answer one prompt as it is written: an iterator of token ids; arguments and errors as in `generate`."""
    for step in decode(model, [ids], max_new_tokens, _stops(tokenizer, stop_ids), Sampling(**sampling)):
        for _, token in step:
            yield token


def room(model, ids, max_new_tokens):
    """How many tokens may follow this prompt; UserError when there is nothing to go by or no room for a token."""
    vocab_size, longest = model.args.vocab_size, model.args.max_seq_len
    if not ids:
        raise UserError("the prompt is empty: a model needs at least one token, such as <s>, to go on from")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(f"the prompt has a token id outside the model's vocabulary of {vocab_size}: "
                        "use the tokenizer that is in the run folder")
    if len(ids) >= longest:
        raise UserError(f"the prompt has {len(ids)} tokens and the model takes {longest}, prompt and answer together: "
                        "shorten the prompt, or train with a larger --max_seq_len")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for nothing: give 1 or more")
    return min(max_new_tokens, longest - len(ids))


@torch.inference_mode()
def decode(model, prompts, max_new_tokens, stop_ids, sampling):
    """The loop: yields a step's tokens as (row, token) pairs; rows that have ended leave the batch."""
    limits = [room(model, ids, max_new_tokens) for ids in prompts]
    if not prompts:
        return
    was_training = model.training
    if was_training:
        model.eval()
    try:
        reader = (Cached if model.accepts("state") else Recomputed)(model)
        logits = reader.read(prompts, max(len(ids) + limit for ids, limit in zip(prompts, limits)))     # (B, V)
        device, rows = logits.device, list(range(len(prompts)))
        uniforms = sampling.uniforms(len(rows), max(limits)).to(device) if sampling.temperature else None
        seen = _seen(prompts, logits) if sampling.repetition_penalty != 1 else None
        for step in range(max(limits)):
            if seen is not None:
                logits = penalize(logits, seen, sampling.repetition_penalty)
            tokens = pick(logits, sampling, None if uniforms is None else uniforms[:, step])            # (B,)
            chosen = tokens.tolist()                        # the one place where the host waits for the device
            if min(chosen) < 0:
                raise UserError("the model's logits are not finite: its training diverged, or the weights do not "
                                "bear this precision; choose an earlier checkpoint or --precision=fp32")
            yield [(row, token) for row, token in zip(rows, chosen) if token not in stop_ids]
            alive = [i for i, token in enumerate(chosen) if token not in stop_ids and step + 1 < limits[rows[i]]]
            if not alive:
                return
            if len(alive) < len(rows):
                rows, index = [rows[i] for i in alive], torch.tensor(alive, device=device)
                tokens = tokens[index]
                reader = reader.keep(index, max(len(prompts[row]) for row in rows) + step)
                uniforms = None if uniforms is None else uniforms[index]
                seen = None if seen is None else seen[index]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            logits = reader.step(tokens)
    finally:
        if was_training:
            model.train()


class Cached:
    """Reads each token once: what the model needs to remember of a row is in its state."""

    def __init__(self, model, state=None):
        self.model, self.state = model, state

    def read(self, prompts, longest):
        """Prefill: prompts of one length go through in one pass, each length into its own rows.

        No padding: a recurrent state would swallow it, and which kind of state a model keeps is not known here.
        """
        device = next(self.model.parameters()).device
        self.state = self.model.init_state(len(prompts), longest)
        by_length = {}
        for row, ids in enumerate(prompts):
            by_length.setdefault(len(ids), []).append(row)
        logits = None
        for rows in by_length.values():
            ids, index = torch.tensor([prompts[row] for row in rows], device=device), torch.tensor(rows, device=device)
            part = self.state if len(by_length) == 1 else self.model.init_state(len(rows), longest)
            last = self._forward(ids, part)
            if part is not self.state:
                self.state.put(index, part)
            if logits is None:
                logits = last.new_empty(len(prompts), last.shape[-1])
            logits[index] = last
        return logits

    def step(self, tokens):
        return self._forward(tokens[:, None], self.state)

    def keep(self, index, upto):
        state = self.state.rows(index)
        state.upto = upto               # the longest row may have left: then there is room again for the others
        return Cached(self.model, state)

    def _forward(self, ids, state):
        state.last_only = True
        logits = self.model(ids, state=state)[0]
        state.advance(ids.shape[1])
        return logits[:, -1]


class Recomputed:
    """Reads the whole row again for every token: slow, and needs nothing but the plain forward.

    Shorter rows are padded on the right, where a causal model cannot see it.
    """

    def __init__(self, model, ids=None, lengths=None, upto=0):
        self.model, self.ids, self.lengths, self.upto = model, ids, lengths, upto

    def read(self, prompts, longest):
        device = next(self.model.parameters()).device
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long)                                # (B, longest)
        for row, ids in enumerate(prompts):
            self.ids[row, :len(ids)] = torch.tensor(ids)
        self.ids, self.lengths = self.ids.to(device), torch.tensor([len(ids) for ids in prompts], device=device)
        self.upto = max(len(ids) for ids in prompts)
        return self._forward()

    def step(self, tokens):
        self.ids.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths, self.upto = self.lengths + 1, self.upto + 1
        return self._forward()

    def keep(self, index, upto):
        return Recomputed(self.model, self.ids[index], self.lengths[index], upto)

    def _forward(self):
        logits = self.model(self.ids[:, :self.upto])[0]                                                # (B, T, V)
        return logits[torch.arange(len(logits), device=logits.device), self.lengths - 1]


def _stops(tokenizer, stop_ids):
    return {tokenizer.eos_id, tokenizer.im_end_id} if stop_ids is None else set(stop_ids)


def _seen(prompts, logits):
    seen = torch.zeros_like(logits, dtype=torch.bool)                                                   # (B, V)
    for row, ids in enumerate(prompts):
        seen[row, torch.tensor(ids, device=logits.device)] = True
    return seen
