"""Does decoding through `state` give what the full forward gives?"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from checks.harness import ModelUnderTest, NotApplicable, call, logits_of, require, require_close
from checks.harness.model_under_test import LONG
from model.basemodel import BaseModel, State


def _decode(model: BaseModel, ids: Tensor, state: State, sizes: Iterable[int]) -> Tensor:
    """Return the logits of `ids` (B, T) fed to `state` in chunks of the given sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(logits_of(model, ids[:, start : start + size], state=state))
        state.advance(size)
        start += size
    return torch.cat(parts, dim=1)


def _chunks(total: int, sizes: Sequence[int]) -> list[int]:
    """Cut `total` into pieces that go through `sizes` again and again."""
    out: list[int] = []
    while sum(out) < total:
        out.append(min(sizes[len(out) % len(sizes)], total - sum(out)))
    return out


def _build_long(tested: ModelUnderTest) -> BaseModel | None:
    """Return a model for `LONG` tokens, or None: then the tiny size has to do."""
    try:
        return tested.build_long()
    except NotApplicable:
        return None


@torch.no_grad()
def chunks_equal_full_forward(tested: ModelUnderTest) -> None:
    """Token by token, in uneven chunks, and a prompt followed by steps: up to exactly max_seq_len, the same logits.

    Measured: the logits of every chunk against those of one forward pass over the full sequence, in eval and train
    mode.
    Causes: rotary positions counted from 0 in every chunk; keys rotated again when they are read; a causal mask of the
    chunk that forgets the offset; the last token of a chunk not stored; a convolution or token shift that starts each
    chunk from zeros; a state updated before it is read on one path and after it on the other; a cache in low precision.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    full, total = logits_of(model, ids), ids.shape[1]
    for sizes in ([1], [3, 1, 5, 2], [total // 2, 1], [total], [total - 1, 1], [1, total - 1]):
        got = _decode(model, ids, model.init_state(len(ids)), _chunks(total, sizes))
        require_close(got, full, f"decoding in chunks of {sizes} against the full forward")
    short = total // 2
    got = _decode(model, ids[:, :short], model.init_state(len(ids), short), [1] * short)
    require_close(got, full[:, :short], f"a state with room for {short} tokens against the full forward")


@torch.no_grad()
def long_sequences(tested: ModelUnderTest) -> None:
    """The same over 300 tokens: beyond windows, chunks and short tables.

    Measured: a prompt of 150 tokens, ten steps, a chunk of 71, and steps to the end of 240 tokens.
    Causes: a window that is cut one token too early or late when it slides; a chunk's state carried over wrongly; a
    numerical drift of the recurrent state.
    """
    tested.needs("state")
    model, ids = tested.build_long(), tested.tokens(batch_size=2, length=240)
    sizes = [150, *[1] * 10, 71, *[1] * 9]
    got = _decode(model, ids, model.init_state(2, LONG), sizes)
    what = "240 tokens in chunks of 150, 1 .., 71, 1 .. against the full forward"
    require_close(got, logits_of(model, ids), what, 1e-3)


@torch.no_grad()
def sequences_at_their_own_positions(tested: ModelUnderTest) -> None:
    """Sequences at different positions decode as if alone, after `overwrite` and `select` moved them.

    Measured: prompts of different lengths put into a used batch, decoded together by steps and in chunks; the same with
    prompts of 3 to 150 tokens, beyond windows and chunks.
    Causes: `pos[0]`, `pos.max()` or `max_pos` taken for all sequences; the mask not per sequence; leftovers of another
    text read as keys; a ring or compressed entries written where the first sequence stands; something in the state
    whose dim 0 is not the batch."""
    tested.needs("state")
    _at_their_own_positions(tested.build(), tested.tokens(batch_size=4), [5, 1, 9, 3], 8, [1, 2, *[1] * 12])
    model = _build_long(tested)
    if model is not None:
        ids = tested.tokens(batch_size=4, length=LONG)
        _at_their_own_positions(model, ids, [150, 3, 71, 128], 160, [1, 2, *[1] * 6, 7, 1, 66, *[1] * 4])


@torch.no_grad()
def _at_their_own_positions(
    model: BaseModel, ids: Tensor, lengths: list[int], used: int, sizes: Sequence[int], tolerance: float = 1e-3
) -> None:
    """Prompts of `lengths` tokens in a batch that read `used` other ones before, and go on in chunks of `sizes`."""
    full, batch = logits_of(model, ids), model.init_state(len(ids))
    tolerance = tolerance if ids.shape[1] == LONG else 2e-4
    _decode(model, ids.flip(1)[:, :used], batch, [used])  # another text was here before
    for index, length in enumerate(lengths):
        alone = model.init_state(1)
        _decode(model, ids[index : index + 1, :length], alone, [length])
        batch.overwrite([index], alone)
    at, every = torch.tensor(lengths), torch.arange(len(ids))[:, None]
    for size in sizes:
        if batch.max_pos + size > batch.max_len:
            break
        wanted = at[:, None] + torch.arange(size)
        got = logits_of(model, ids.gather(1, wanted), state=batch)
        batch.advance(size)
        require_close(got, full[every, wanted], f"sequences at positions {at.tolist()}", tolerance)
        at = at + size
    picked = batch.select([2, 0])
    if picked.max_pos < batch.max_len:
        got = logits_of(model, ids[[2, 0]].gather(1, at[[2, 0], None]), state=picked)[:, 0]
        require_close(got, full[[2, 0], at[[2, 0]]], "two sequences picked out of the batch", tolerance)


@torch.no_grad()
def clone_is_independent(tested: ModelUnderTest) -> None:
    """A trial continuation on a clone, and another state in between, leave the first state as it was.

    Measured: half a sequence, then other tokens on a clone and on a second state in turn, then the other half.
    Causes: a cache that lives on the module; two states that share a tensor; state kept in a list or an attribute that
    `state.layers` does not hold, so that `clone`, `select` and `overwrite` cannot see it.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    full, half = logits_of(model, ids), ids.shape[1] // 2
    state, other = model.init_state(len(ids)), model.init_state(len(ids))
    steps = []
    for t in range(half):  # two texts in turn
        steps.append(_decode(model, ids[:, t : t + 1], state, [1]))
        _decode(model, ids.flip(0)[:, t : t + 1], other, [1])
    require_close(torch.cat(steps, dim=1), full[:, :half], "one of two states fed in turn")
    trial = state.clone()
    got = _decode(model, ids[:, half:], state.clone(), [1] * (ids.shape[1] - half))
    require_close(got, full[:, half:], "going on on a clone")
    _decode(model, ids[:, :half].flip(1), trial, [half])
    got = _decode(model, ids[:, half:], state, [1] * (ids.shape[1] - half))
    require_close(got, full[:, half:], "going on after a trial on a clone")
    got = _decode(model, ids.flip(0)[:, half:], other, [ids.shape[1] - half])
    require_close(got, full.flip(0)[:, half:], "the second state")


@torch.no_grad()
def rewound_tokens_leave_no_trace(tested: ModelUnderTest) -> None:
    """After a trial of other tokens, going back to where it began is as if they had never been read.

    Measured: at every position, one token and then `state.room` tokens of another sequence are read, `pos` is moved
    back, and the tensors that `state.rewindable` does not name are put back as they were; then the sequence goes on.
    The same at fifteen positions among 300, where rings are full and chunks end.
    Causes: a recurrent state, a running sum or a tail of fixed size declared rewindable; a ring without `state.room`
    slots more than its window; leftovers of later positions that no mask hides; a tensor kept outside the state.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    state, steps = model.init_state(len(ids)), []
    for t in range(ids.shape[1]):
        _trials(model, ids.flip(0)[:, t:], state)
        steps.append(_decode(model, ids[:, t : t + 1], state, [1]))
    require_close(torch.cat(steps, dim=1), logits_of(model, ids), "single steps with a trial before each")
    long_model = _build_long(tested)
    if long_model is not None:
        ids = tested.tokens(batch_size=2, length=LONG)
        full, state, start = logits_of(long_model, ids), long_model.init_state(2), 0
        for end in (61, 62, 63, 64, 65, 126, 127, 128, 129, 200, 254, 255, 256, 257, 290):
            got = _decode(long_model, ids[:, start:end], state, [end - start])
            require_close(got, full[:, start:end], f"tokens {start}..{end - 1} after a trial before them", 1e-3)
            _trials(long_model, ids.flip(0)[:, end:], state)
            start = end


def _trials(model: BaseModel, ids: Tensor, state: State) -> None:
    """Read one of the tokens `ids` (B, T), then `state.room` of them, and take them back as speculation does."""
    for n_tokens in (1, min(state.room, ids.shape[1])):
        held = [*state.layers, state.model]
        before = [{k: x.clone() for k, x in tensors.items() if k not in state.rewindable} for tensors in held]
        _decode(model, ids[:, :n_tokens], state, [n_tokens])
        state.rewind(n_tokens)
        for tensors, copies in zip(held, before, strict=True):
            for name in [name for name in tensors if name not in state.rewindable and name not in copies]:
                del tensors[name]  # the trial made it
            tensors.update(copies)


@torch.no_grad()
def sequences_can_be_reordered(tested: ModelUnderTest) -> None:
    """Beam copies and freed slots: selected sequences continue unchanged, and an empty slot starts from nothing.

    Measured: `select` with a sequence twice and in another order; a fresh state written over a sequence that was in
    use.
    Causes: something in the state whose dim 0 is not the batch; a recurrent state that is not zeroed for a new text;
    last ids or gates for which 0 does not mean "nothing seen", and `state.empty` does not say what does.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    full, half, order = logits_of(model, ids), ids.shape[1] // 2, [2, 0, 2, 1]
    state = model.init_state(len(ids))
    _decode(model, ids[:, :half], state, [half])
    held = {f"state.layers[{layer}]": tensors for layer, tensors in enumerate(state.layers)} | {
        "state.model": state.model
    }
    for where, tensors in held.items():
        for name, tensor in tensors.items():
            require(isinstance(tensor, Tensor), f"{where}[{name!r}] is {type(tensor).__name__}, expected a tensor")
            require(
                tensor.ndim and tensor.shape[0] == len(ids),
                f"{where}[{name!r}] has shape {tuple(tensor.shape)}: dim 0 must be the batch, {len(ids)}",
            )
    got = _decode(model, ids[order, half:], state.select(order), [1] * (ids.shape[1] - half))
    require_close(got, full[order, half:], f"sequences {order} of a state")
    state.overwrite([1], model.init_state(1))
    n = ids.shape[1] - half - 1
    mixed = torch.stack((ids[0, half : half + n], ids[1, :n], ids[2, half : half + n]))
    got = _decode(model, mixed, state, [1] * n)
    require_close(got[1], full[1, :n], "a new text in a sequence that was in use")
    require_close(got[[0, 2]], full[[0, 2], half : half + n], "the sequences next to a new text")


@torch.no_grad()
def forward_leaves_pos_alone(tested: ModelUnderTest) -> None:
    """`forward` reads `pos` and does not move it; `last_only` gives the last token's logits.

    Measured: `pos`, `max_pos` and `max_len` before and after; the logits with `last_only`.
    Causes: `state.pos += T` or `state.advance` inside forward, which the caller does; `last_only` that takes the first
    token, or leaves out the norm or the scale of the output.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    state = model.init_state(len(ids))
    full = logits_of(model, ids[:, :5], state=state)
    require((state.pos == 0).all() and state.max_pos == 0, "forward moved state.pos: the caller advances it")
    require(len(state.layers) == len(model.init_state(1).layers), "forward appends to state.layers: fill the dicts")
    state = model.init_state(len(ids))
    state.last_only = True
    for start in (0, 5):
        last = call(model, ids[:, start : start + 5], state=state)[0]
        require(last.shape[1] in (1, 5), f"last_only: logits of {last.shape[1]} tokens, expected 1 (or all)")
        want = full[:, -1] if start == 0 else logits_of(model, ids)[:, 9]
        require_close(last[:, -1], want, f"logits with last_only of tokens {start}..{start + 4}")
        state.advance(5)


@torch.no_grad()
def memory_is_bounded(tested: ModelUnderTest) -> None:
    """The state holds no more after many small steps than after one large one, and grows with max_len at most.

    Measured: bytes of all tensors in the state after max_seq_len tokens, fed in one chunk and one by one; in a state of
    half the length; for one sequence and for two.
    Causes: chunks appended twice; the full history kept for a window; memory taken for max_seq_len instead of the
    state's max_len.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens(batch_size=2)
    total = ids.shape[1]

    def used(batch_size: int, length: int, sizes: list[int], max_len: int) -> int:
        state = model.init_state(batch_size, max_len)
        _decode(model, ids[:batch_size, :length], state, sizes)
        tensors = [t for held in [*state.layers, state.model] for t in held.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    one_chunk = used(2, total, [total], total)
    steps = used(2, total, [1] * total, total)
    require(steps <= 1.02 * one_chunk + 64, f"{total} single steps leave {steps} bytes, one chunk leaves {one_chunk}")
    half = used(2, total // 2, [total // 2], total // 2)
    require(half <= one_chunk, f"a state of half the length takes {half} bytes, the full one {one_chunk}")
    one = used(1, total, [total], total)
    require(
        abs(2 * one - one_chunk) <= 0.02 * one_chunk + 64,
        f"one sequence takes {one} bytes, two sequences take {one_chunk}",
    )
    if not one_chunk:
        raise NotApplicable("the state holds nothing")


@torch.no_grad()
def drafts_in_chunks_agree(tested: ModelUnderTest) -> None:
    """A model's own `draft` gives the same in one chunk, in uneven chunks, and token by token.

    Measured: the logits and the hidden vectors of `draft` over the `state.hidden` of a sequence, with a state for
    drafts alone; sequences alone against the batch; `last_only`.
    Causes: positions of drafts counted from 0 in every chunk; keys of drafts not kept, or kept in the main state; an
    off-by-one between hidden vectors and tokens; `state.hidden` taken before the last norm in some calls only.
    """
    tested.needs("state")
    model, ids = tested.build(), tested.tokens()
    if getattr(model, "draft", None) is None:
        raise NotApplicable("the model has no draft")
    state, total = model.init_state(len(ids)), ids.shape[1] - 1
    logits_of(model, ids[:, :total], state=state)
    hidden = state.hidden
    require(isinstance(hidden, Tensor), "a model that drafts sets state.hidden in forward; it is not set")
    assert hidden is not None and model.draft is not None
    require(
        hidden.shape[:2] == (len(ids), total),
        f"state.hidden has shape {tuple(hidden.shape)} after {total} tokens of {len(ids)} sequences: (B, T, D)",
    )

    def drafts(at: slice, sizes: Sequence[int], last_only: bool = False) -> Tensor:
        own, parts, start = model.init_state(len(ids[at])), [], 0
        own.last_only = last_only
        for size in _chunks(total, sizes):
            logits, further = model.draft(hidden[at, start : start + size], ids[at, start + 1 : start + size + 1], own)
            own.advance(size)
            start += size
            parts.append(logits if last_only else torch.cat((logits, further), dim=-1))
        return torch.cat(parts, dim=1)

    want = drafts(slice(None), [total])
    for sizes in ([1], [3, 1, 5, 2], [total - 1, 1]):
        require_close(drafts(slice(None), sizes), want, f"drafts in chunks of {sizes} against all at once")
    require_close(drafts(slice(1, 2), [total]), want[1:2], "drafts of one sequence alone against the batch")
    last = drafts(slice(None), [total], last_only=True)
    vocab = tested.args.vocab_size
    require_close(last[:, -1], want[:, -1, :vocab], "drafts with last_only against all", 2e-4)
