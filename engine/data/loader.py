"""The batches of every optimizer step, made by a thread while the device computes the step before."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.data.sequences import IGNORE, PADDING, Sequences, empty_sequence
from engine.data.shuffle import shuffled


@dataclass
class StepBatches:
    """One process's share of an optimizer step."""

    batches: list[dict[str, torch.Tensor]]  # micro-batches, each tensor (B, T) int64
    sequences: list[int]  # indices of the sequences of the full step, over all processes
    epoch: int
    targets: list[int]  # valid targets of each micro-batch
    tokens: int  # tokens of this process's share, padding excluded


class StepSizes(Protocol):
    """What the loader needs of a BatchPlan (engine/training/batch_plan.py)."""

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before `step`."""

    def micro_sequences_at(self, step: int) -> int:
        """Sequences per micro-batch of `step`."""


def collate(
    sequences: list[dict[str, np.ndarray]], with_doc_ids: bool, pin: bool = False, trim: bool = False
) -> dict[str, torch.Tensor]:
    """Stack sequences into the keyword arguments of forward, each (B, T).

    trim: drop the columns that are padding in every sequence, to a multiple of 16. Unpacked sequences are mostly
    padding. Not for a compiled model, which would be compiled again for every width.
    """
    keys = ("input_ids", "targets", "doc_ids") if with_doc_ids else ("input_ids", "targets")
    arrays = {key: np.stack([sequence[key] for sequence in sequences]) for key in keys}  # (B, T)
    if trim and not with_doc_ids:
        used = np.flatnonzero(np.any([sequence["doc_ids"] != PADDING for sequence in sequences], axis=0))
        width = -(-(used[-1] + 1) // 16) * 16 if len(used) else 16
        arrays = {key: np.ascontiguousarray(array[:, :width]) for key, array in arrays.items()}
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class StepLoader:
    """Iterates over StepBatches from step `start` to `total_steps`.

    The sequences of a step are a slice of the epoch's shuffle, cut into micro-batches that the ranks take in turn: the
    number of processes changes neither the global batch nor the micro-batches. Call close() when leaving early.
    """

    def __init__(
        self,
        data: Sequences,
        plan: StepSizes,
        seed: int,
        start: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        trim: bool = False,
    ):
        self.data = data
        self.plan = plan
        self.seed = seed
        self.start = start
        self.total_steps = total_steps
        self.rank = rank
        self.world_size = world_size
        self.pin = pin
        self.trim = trim
        self.queue: queue.Queue = queue.Queue(maxsize=2)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)

    def step_sequences(self, step: int) -> tuple[np.ndarray, int]:
        """Indices (G,) of the sequences of a step, and the epoch it begins in; a step may span two epochs."""
        positions = np.arange(self.plan.sequences_before(step), self.plan.sequences_before(step + 1), dtype=np.int64)
        n = len(self.data)
        epochs = positions // n
        chosen = [shuffled(positions[epochs == e] % n, n, self.seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(chosen), int(epochs[0])

    def make(self, step: int) -> StepBatches:
        """This rank's micro-batches of `step`, a function of (seed, step) alone."""
        indices, epoch = self.step_sequences(step)
        size = self.plan.micro_sequences_at(step)
        batches, targets, tokens = [], [], 0
        for start in range(self.rank * size, len(indices), self.world_size * size):
            sequences = [self.data.sequence(int(i)) for i in indices[start : start + size]]
            batches.append(collate(sequences, self.data.with_doc_ids, self.pin, self.trim))
            targets.append(sum(int((sequence["targets"] != IGNORE).sum()) for sequence in sequences))
            tokens += sum(int((sequence["doc_ids"] != PADDING).sum()) for sequence in sequences)
        return StepBatches(batches, indices.tolist(), epoch, targets, tokens)

    def _fill(self) -> None:
        try:
            for step in range(self.start, self.total_steps):
                self._put(self.make(step))
                if self.closed.is_set():
                    return
        except BaseException as error:  # raised again by __iter__, in the caller's thread
            self._put(error)

    def _put(self, item: StepBatches | BaseException) -> None:
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[StepBatches]:
        self.thread.start()
        for _ in range(self.start, self.total_steps):
            item = self.queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)


def held_out_batches(
    data: Sequences, batch_size: int, limit: int, rank: int = 0, world_size: int = 1, trim: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for evaluation: the first `limit` (0: all) sequences of a fixed shuffle, taken by the ranks in turn.

    The last batch is filled up with empty sequences: all batches have one shape, so that nothing is compiled twice, and
    every rank gets the same number of batches, because the ranks of a sharded model compute each one together.
    """
    count = min(limit or len(data), len(data))
    order = shuffled(np.arange(count, dtype=np.int64), len(data), seed=0, epoch=0)
    for first in range(0, count, world_size * batch_size):
        start = first + rank * batch_size
        chosen = [data.sequence(int(i)) for i in order[start : start + batch_size]]
        chosen += [empty_sequence(data.seq_len, data.file.pad_id)] * (batch_size - len(chosen))
        yield collate(chosen, data.with_doc_ids, trim=trim)
