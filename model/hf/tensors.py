"""How a published tensor is made from ours, and back: operations that `Layout.stored` and `Layout.joined` list.

Each has `write(ours)` -> theirs and `read(theirs, shape)` -> ours of that shape. They also run on the meta device:
so the shapes of a checkpoint are known without its weights. (Only as views: other operators load the compiler there.)
"""

import re
from dataclasses import dataclass

import torch

from utils.errors import ModelError


@dataclass(frozen=True, eq=False)
class Rows:
    """The indices along `dim` in another order: theirs = ours[order]."""

    order: torch.Tensor
    dim: int = 0

    def write(self, ours):
        return ours if ours.is_meta else ours.index_select(self.dim, self.order.to(ours.device))

    def read(self, theirs, shape):
        return theirs.index_select(self.dim, self.order.argsort().to(theirs.device))


@dataclass(frozen=True)
class Transposed:
    """Two dimensions exchanged, the last two by default."""

    a: int = -2
    b: int = -1

    def write(self, ours):
        return ours.transpose(self.a, self.b)

    def read(self, theirs, shape):
        return theirs.transpose(self.a, self.b)


class Shape:
    """The same numbers in another shape, with -1 for the size that follows from the rest: Shape(-1, 1, 4)."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def write(self, ours):
        return ours.reshape(self.sizes)

    def read(self, theirs, shape):
        return theirs.reshape(shape)


class MinusOne:
    """A norm that multiplies by weight, where theirs multiplies by 1 + weight: theirs = ours - 1.

    Exact for ours between 0.5 and 2, and rounded elsewhere: a model whose own weight is the small one does not need it.
    """

    def write(self, ours):
        return ours if ours.is_meta else ours - 1

    def read(self, theirs, shape):
        return theirs + 1


@dataclass(frozen=True, eq=False)
class Join:
    """Several of our tensors as one of theirs: concatenated along `dim`, and then changed by the operations `then`.

    parts: for each of ours, in the order that they have in theirs, the part of its dotted name that the others lack,
    such as ("q_proj", "k_proj", "v_proj") or ("pre.scale", "post.scale").
    """

    parts: tuple
    dim: int = 0
    then: tuple = ()


def interleaved_rows(n_heads, n_plain, n_rotary):
    """Return the row order of a projection whose rotary pairs are neighbours: theirs = ours[order].

    Each head has `n_plain` rows without positions, then `n_rotary` rows with. A score is a sum over pairs, so the same
    reordering of the rows of q and k does not change it. We and transformers' Llama rotate halves, (x[j], x[j + K/2]),
    whose slices are contiguous. DeepSeek, and Meta's own files of Llama, rotate neighbours, (x[2j], x[2j + 1]). Import
    and export reorder the rows once; no forward depends on the layout.
    """
    plain = torch.arange(n_plain)
    rotary = n_plain + torch.arange(n_rotary).view(2, -1).T.flatten()  # 0, K/2, 1, K/2 + 1, ...
    head = torch.cat((plain, rotary))
    return (torch.arange(n_heads)[:, None] * len(head) + head).flatten()


def alternating_blocks(n_parts, n_blocks, size=1):
    """Return the order in which `n_parts` tensors, each of `n_blocks` blocks of `size` rows, alternate block by block.

    After Join(("q_proj", "gate_proj")), alternating_blocks(2, n_heads, head_dim) puts the query and the gate of a head
    together; after Join(("gate_proj", "up_proj"), dim=1), alternating_blocks(2, inter_dim) alternates their rows.
    """
    return torch.arange(n_parts * n_blocks * size).view(n_parts, n_blocks, size).transpose(0, 1).flatten()


@dataclass(frozen=True, eq=False)
class Piece:
    """Tensors of ours that are written together, and what becomes of them.

    theirs: the published name, in which `*` is the index of dim 0 and {a,b} names equal parts of dim 0.
    """

    theirs: str
    ours: list  # names
    targets: list  # the tensors of the model
    steps: list  # operations, a tuple for each
    join: Join | None = None

    def arrange(self):
        """Order the tensors as they are joined; ModelError unless each part is there once."""
        if self.join is None:
            return
        place = [[i for i, part in enumerate(self.join.parts) if f".{part}." in f".{name}."] for name in self.ours]
        if sorted(place) != [[i] for i in range(len(self.join.parts))]:
            parts = ", ".join(self.join.parts)
            raise ModelError(
                f"{self.theirs} joins {parts}, and the names of the hf_layout give {self.ours}: correct one"
            )
        for each in (self.ours, self.targets, self.steps):
            each[:] = [value for _, value in sorted(zip(place, each, strict=True), key=lambda pair: pair[0])]

    def names(self):
        """Return the published names."""
        if "*" in self.theirs:
            return [self.theirs.replace("*", str(i)) for i in range(self._shape()[0])]
        found = re.search(r"\{(.*?)\}", self.theirs)
        return [self.theirs.replace(found[0], word) for word in found[1].split(",")] if found else [self.theirs]

    def write(self, tensors):
        """Return {published name: tensor} for `tensors` in the place of ours."""
        whole = self._whole(tensors)
        names = self.names()
        if "*" in self.theirs:
            return dict(zip(names, whole.unbind(), strict=True))
        if len(names) == 1:
            return {names[0]: whole}
        if len(whole) % len(names):
            raise ModelError(
                f"{len(whole)} rows of {self.ours[0]} are not {len(names)} equal parts: correct the hf_layout"
            )
        return dict(zip(names, whole.chunk(len(names)), strict=True))

    def shapes(self):
        """Return {published name: shape}."""
        return {name: tuple(tensor.shape) for name, tensor in self.write(self._meta()).items()}

    def read(self, sources):
        """Return tensors like ours for those of `names()`, which have the right shapes and types."""
        whole = torch.stack(sources) if "*" in self.theirs else torch.cat(sources) if len(sources) > 1 else sources[0]
        if self.join is None:
            return [_undo(self.steps[0], whole, self.targets[0])]
        stored = [_apply(steps, tensor) for steps, tensor in zip(self.steps, self._meta(), strict=True)]
        whole = _undo(self.join.then, whole, _cat(stored, self.join.dim))
        parts = whole.split([part.shape[self.join.dim] for part in stored], self.join.dim)
        return [_undo(*each) for each in zip(self.steps, parts, self.targets, strict=True)]

    def _whole(self, tensors):
        changed = [_apply(steps, tensor) for steps, tensor in zip(self.steps, tensors, strict=True)]
        return changed[0] if self.join is None else _apply(self.join.then, _cat(changed, self.join.dim))

    def _shape(self):
        return self._whole(self._meta()).shape

    def _meta(self):
        return [target.detach().to("meta") for target in self.targets]


def _cat(tensors, dim):
    """torch.cat, which on the meta device would load the compiler for a shape."""
    if not tensors[0].is_meta:
        return torch.cat(tensors, dim)
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].new_empty(shape)


def _apply(steps, tensor):
    for step in steps:
        tensor = step.write(tensor)
    return tensor


def _undo(steps, tensor, target):
    """The tensor of the shape of `target` whose image under `steps` is `tensor`."""
    before = [target.detach().to("meta")]
    for step in steps[:-1]:
        before.append(step.write(before[-1]))
    for step, like in zip(reversed(steps), reversed(before)):
        tensor = step.read(tensor, like.shape)
    return tensor
