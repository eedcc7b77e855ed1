"""From rows to the batches of a step, made by a thread while the step before is computed."""

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from engine.data.sequences import IGNORE, empty_row, shuffled


@dataclass
class StepBatches:
    """One process's share of an optimizer step."""

    batches: list[dict[str, torch.Tensor]]  # micro-batches, each tensor (B, T) int64
    rows: list[int]  # the row numbers of the whole step, over all processes
    epoch: int
    targets: list[int]  # valid targets of each micro-batch
    tokens: int  # tokens of this process's share that are not padding


def collate(
    rows: list[dict[str, np.ndarray]], with_doc_ids: bool, pad_id: int, pin: bool = False, trim: bool = False
) -> dict[str, torch.Tensor]:
    """Stack rows into the keyword arguments of forward.

    trim: cut columns that are padding in every row, to a multiple of 16. Rows of one document each are mostly padding;
    not for a compiled model, which would be compiled anew for every width.
    """
    keys = ("input_ids", "targets", "doc_ids") if with_doc_ids else ("input_ids", "targets")
    arrays = {key: np.stack([row[key] for row in rows]) for key in keys}  # (B, T)
    if trim and not with_doc_ids:
        used = np.flatnonzero((arrays["input_ids"] != pad_id).any(axis=0))
        width = -(-(used[-1] + 1) // 16) * 16 if len(used) else 16
        arrays = {key: np.ascontiguousarray(array[:, :width]) for key, array in arrays.items()}
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class StepLoader:
    """Iterates over StepBatches from step `start` to `total_steps`.

    The step's rows are a slice of the epoch's shuffle, cut into micro-batches that are dealt to the ranks in turn: the
    number of processes changes neither the global batch nor the micro-batches. Call close() when leaving early.
    """

    def __init__(
        self,
        rows,
        plan,
        seed: int,
        start: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        trim: bool = False,
    ):
        self.rows, self.plan, self.seed, self.start, self.total_steps = rows, plan, seed, start, total_steps
        self.rank, self.world_size, self.pin, self.trim = rank, world_size, pin, trim
        self.queue: queue.Queue = queue.Queue(maxsize=2)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)

    def step_rows(self, step: int) -> tuple[np.ndarray, int]:
        """Row numbers (G,) of a step and the epoch it begins in; a step may reach into the next epoch."""
        places = np.arange(self.plan.rows_before(step), self.plan.rows_before(step + 1), dtype=np.int64)
        n = len(self.rows)
        epochs = places // n
        chosen = [shuffled(places[epochs == e] % n, n, self.seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(chosen), int(epochs[0])

    def make(self, step: int) -> StepBatches:
        numbers, epoch = self.step_rows(step)
        size, batches, targets, tokens = self.plan.micro_at(step), [], [], 0
        for start in range(self.rank * size, len(numbers), self.world_size * size):
            rows = [self.rows.row(int(n)) for n in numbers[start : start + size]]
            batches.append(collate(rows, self.rows.with_doc_ids, self.rows.file.pad_id, self.pin, self.trim))
            targets.append(sum(int((row["targets"] != IGNORE).sum()) for row in rows))
            tokens += sum(int((row["input_ids"] != self.rows.file.pad_id).sum()) for row in rows)
        return StepBatches(batches, numbers.tolist(), epoch, targets, tokens)

    def _fill(self) -> None:
        try:
            for step in range(self.start, self.total_steps):
                self._put(self.make(step))
                if self.closed.is_set():
                    return
        except BaseException as error:  # raised again where the batch is asked for
            self._put(error)

    def _put(self, item) -> None:
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def __iter__(self):
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


def held_out_batches(rows, batch_rows: int, limit: int, rank: int = 0, world_size: int = 1, trim: bool = False):
    """Batches for evaluation: the first `limit` (0: all) of a fixed shuffle, dealt to the ranks in turn.

    Missing rows are empty ones: every batch has one shape, so that nothing is compiled twice, and every rank gets as
    many batches, for the ranks of a model that is shared out compute each one together.
    """
    count = min(limit or len(rows), len(rows))
    order = shuffled(np.arange(count, dtype=np.int64), len(rows), seed=0, epoch=0)
    for first in range(0, count, world_size * batch_rows):
        start = first + rank * batch_rows
        chosen = [rows.row(int(n)) for n in order[start : start + batch_rows]]
        chosen += [empty_row(rows.seq_len, rows.file.pad_id)] * (batch_rows - len(chosen))
        yield collate(chosen, rows.with_doc_ids, rows.file.pad_id, trim=trim)
