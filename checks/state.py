"""Does decoding through `state` give what the full forward gives?"""

import torch

from .subject import require, require_close


def _decode(model, ids, state, sizes):
    """Return the logits of `ids` (B, T) fed to `state` in chunks of the given sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(model(ids[:, start : start + size], state=state)[0])
        state.advance(size)
        start += size
    return torch.cat(parts, dim=1)


def _chunks(total, sizes):
    """Cut `total` into pieces that go through `sizes` again and again."""
    out = []
    while sum(out) < total:
        out.append(min(sizes[len(out) % len(sizes)], total - sum(out)))
    return out


@torch.no_grad()
def chunks_equal_full_forward(subject):
    """Token by token, in uneven chunks, and a prompt followed by steps: up to exactly max_seq_len, the same logits."""
    subject.needs("state")
    model, ids = subject.build(), subject.tokens()
    full, total = model(ids)[0], ids.shape[1]
    for sizes in ([1], [3, 1, 5, 2], [total // 2, 1], [total]):
        got = _decode(model, ids, model.init_state(len(ids)), _chunks(total, sizes))
        require_close(got, full, f"decoding in chunks of {sizes} against the full forward")


@torch.no_grad()
def rows_at_their_own_positions(subject):
    """Rows that stand at different positions decode as if alone, after `put` and `rows` moved them about."""
    subject.needs("state")
    model, ids = subject.build(), subject.tokens(rows=4)
    full, total = model(ids)[0], ids.shape[1]
    lengths = [5, 1, 9, 3]
    batch = model.init_state(len(ids))
    for row, length in enumerate(lengths):
        alone = model.init_state(1)
        _decode(model, ids[row : row + 1, :length], alone, [length])
        batch.put([row], alone)
    for step in range(total - max(lengths)):
        at = torch.tensor(lengths) + step
        got = model(ids.gather(1, at[:, None]), state=batch)[0][:, 0]
        batch.advance(1)
        require_close(got, full[torch.arange(len(ids)), at], f"rows at positions {at.tolist()}")
    picked = batch.rows([2, 0])
    at = batch.pos[[2, 0]]
    if at.max() < total:
        got = model(ids[[2, 0]].gather(1, at[:, None]), state=picked)[0][:, 0]
        require_close(got, full[[2, 0], at], "two rows picked out of the batch")


@torch.no_grad()
def clone_is_independent(subject):
    """A trial continuation on a clone, and another state in between, leave the first state as it was."""
    subject.needs("state")
    model, ids = subject.build(), subject.tokens()
    full, half = model(ids)[0], ids.shape[1] // 2
    state, other = model.init_state(len(ids)), model.init_state(len(ids))
    _decode(model, ids[:, :half], state, [half])
    trial = state.clone()
    _decode(model, ids[:, :half].flip(1), trial, [half])
    _decode(model, ids.flip(0)[:, :half], other, [half])
    got = _decode(model, ids[:, half:], state, [1] * (ids.shape[1] - half))
    require_close(got, full[:, half:], "going on after a trial on a clone")


@torch.no_grad()
def forward_leaves_pos_alone(subject):
    """`forward` reads `pos` and does not move it; `last_only` gives the last token's logits."""
    subject.needs("state")
    model, ids = subject.build(), subject.tokens()
    state = model.init_state(len(ids))
    full = model(ids, state=state)[0]
    require((state.pos == 0).all() and state.upto == 0, "forward moved state.pos: the caller advances it")
    state = model.init_state(len(ids))
    state.last_only = True
    last = model(ids, state=state)[0]
    require_close(last[:, -1], full[:, -1], "logits with last_only")
