"""The inference state of a model."""

from dataclasses import dataclass, field, replace

import torch

from utils.errors import ModelError


@dataclass(eq=False)
class State:
    """What a model keeps between two calls of `forward` while it generates.

    Two rules: dim 0 of every tensor is the batch, and sequences are independent. Declared where a tensor is made:
    `rewindable.add(name)`, if moving `pos` back is enough to forget tokens (slots that the mask hides, rings): all else
    is copied before a trial; `empty[name] = value`, if that and not 0 means "nothing seen".
    """

    pos: torch.Tensor  # (B,) int64, the tokens already seen by each sequence
    max_len: int  # capacity in tokens
    layers: list[dict]  # one dict of tensors per layer, which the layer fills as it likes
    max_pos: int = 0  # a plain int that no position exceeds, to slice a cache without a device sync
    last_only: bool = False  # set by a caller who needs only the logits of the last token
    model: dict = field(default_factory=dict)  # tensors of the model as a whole
    hidden: torch.Tensor | None = None  # set by a model that can `draft`: the input (B, T, D) of its head
    rewindable: set[str] = field(default_factory=set)
    empty: dict[str, float] = field(default_factory=dict)
    room: int = 8  # tokens that can be rewound at once

    def positions(self, n_tokens):
        """Return the positions (B, T) of the next `n_tokens` tokens of each sequence."""
        if self.max_pos + n_tokens > self.max_len:
            raise ModelError(
                f"{self.max_pos} tokens in the state and {n_tokens} new ones exceed its max_len of {self.max_len}: "
                "make the state longer, or the text shorter"
            )
        return self.pos[:, None] + torch.arange(n_tokens, device=self.pos.device)  # (B, T)

    def advance(self, n_tokens):
        """Count `n_tokens` more tokens in every sequence. The caller of `forward` does this, never the model."""
        self.pos = self.pos + n_tokens
        self.max_pos += n_tokens

    def can_rewind(self):
        """Whether all tensors are rewindable; a recurrent state, for example, is not."""
        return all(name in self.rewindable for held in [*self.layers, self.model] for name in held)

    def rewind(self, n_tokens):
        """Forget the last `n_tokens` <= `room` tokens of every sequence; only where `can_rewind`."""
        self.advance(-n_tokens)

    def select(self, index):
        """Return a new state with copies of the sequences `index` (a list of ints or an int64 tensor)."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.pos.device)
        return self._map(lambda tensor: tensor[index])

    def clone(self):
        """Return an independent copy, to come back to after a trial continuation."""
        return self._map(torch.clone)

    def overwrite(self, index, other):
        """Overwrite the sequences `index` of this state by those of `other`, in order."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.pos.device)
        self.pos = self.pos.index_copy(0, index, other.pos)
        self.max_pos = max(self.max_pos, other.max_pos)
        self.rewindable |= other.rewindable
        self.empty |= other.empty
        for mine, theirs in zip([*self.layers, self.model], [*other.layers, other.model], strict=True):
            for name in mine.keys() - theirs.keys():  # a state that has seen nothing yet holds nothing
                mine[name][index] = self.empty.get(name, 0)
            for name, tensor in theirs.items():
                if name not in mine:
                    mine[name] = tensor.new_full((len(self.pos), *tensor.shape[1:]), self.empty.get(name, 0))
                mine[name][index] = tensor

    def _map(self, function):
        held = [*self.layers, self.model]
        *layers, model = [{name: function(tensor) for name, tensor in tensors.items()} for tensors in held]
        return replace(self, pos=function(self.pos), layers=layers, model=model, hidden=None)
