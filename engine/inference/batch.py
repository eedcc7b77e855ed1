"""The rows of a batch, and what the model remembers of each: in its state, or by reading the texts again."""

import torch

from model.basemodel import State


def open_rows(model, n_rows, max_len):
    """`n_rows` empty rows with room for `max_len` tokens each, of the kind that the model's forward asks for."""
    return (StateRows if model.accepts("state") else TextRows)(model, n_rows, max_len)


class StateRows:
    """Rows of one state of the contract: each token is read once, and the memory is taken once."""

    def __init__(self, model, n_rows, max_len):
        self.model, self.state, self.blank = model, model.init_state(n_rows, max_len), model.init_state(1, max_len)

    def clear(self, row):
        """Forget a row. All of it becomes zeros: a key that is not finite would spoil its row even behind a mask."""
        self.state.overwrite([row], self.blank)

    def swap(self, a, b):
        self.state.overwrite([a, b], self.state.select([b, a]))

    def append(self, first, lengths, ids):
        """Read `ids` (B, T) behind the rows from `first` on, which hold `lengths` tokens: the last logits (B, V).

        The rows are a slice, so the model writes into the one state through views, without copying any of it. What a
        layer does not write in place but replaces, as a recurrence may, is put back.
        """
        state, rows = self.state, slice(first, first + len(ids))
        if len(ids) == len(state.pos):  # all of them: the state itself
            state.max_pos, state.last_only = max(lengths), True
            logits = read(self.model, ids, state)
            state.advance(ids.shape[1])
            return logits[:, -1]
        views = [{name: tensor[rows] for name, tensor in layer.items()} for layer in state.layers]
        part = State(state.pos[rows], state.max_len, [dict(view) for view in views], max(lengths), last_only=True)
        logits = read(self.model, ids, part)
        part.advance(ids.shape[1])
        state.pos[rows] = part.pos
        for layer, view, now in zip(state.layers, views, part.layers, strict=True):
            for name, tensor in now.items():
                if tensor is not view.get(name):
                    if name not in layer:
                        layer[name] = tensor.new_zeros(len(state.pos), *tensor.shape[1:])
                    layer[name][rows] = tensor
        return logits[:, -1]


def read(model, ids, state):
    """The logits (B, 1|T, V) of one forward through a state; compiled where that was asked for."""
    reader = getattr(model, "reader", None)
    return model(ids, state=state)[0] if reader is None else reader(ids, state)


class TextRows:
    """The texts themselves, read from the start for every token: slow, and needs nothing but the plain forward.

    Shorter rows are padded on the right, where a causal model cannot see it.
    """

    def __init__(self, model, n_rows, max_len):
        device = next(model.parameters()).device
        self.model, self.ids = model, torch.zeros(n_rows, max_len, dtype=torch.long, device=device)

    def clear(self, row):
        """Nothing to do: what stands behind a text is overwritten before it is read."""

    def swap(self, a, b):
        self.ids[[a, b]] = self.ids[[b, a]]

    def append(self, first, lengths, ids):
        """As for a state."""
        texts, device = self.ids[first : first + len(ids)], ids.device
        at = torch.tensor(lengths, device=device)[:, None] + torch.arange(ids.shape[1], device=device)  # (B, T)
        texts.scatter_(1, at, ids)
        logits = self.model(texts[:, : max(lengths) + ids.shape[1]])[0]  # (B, T, V)
        return logits[torch.arange(len(ids), device=device), at[:, -1]]
