"""Find the largest micro-batch that fits the device, by trying 1, 2, 4 ... sequences before the training."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from engine.data.loader import collate, to_device
from engine.data.sequences import Sequences
from engine.distributed import process_group
from engine.planning import memory
from engine.runs.protocols import TrainOptimizer
from utils.errors import UserError
from utils.log import format_bytes, log

# The share of the free memory that may be used; the rest is for fragmentation. On a CPU the system's allocator keeps
# much of what was freed: after some steps a process holds up to 1.8 times what the trial took (docs/LOG.md).
SHARES = {"cuda": 0.9}
HOST_SHARE = 0.5


def find_max_batch_size(
    at_most: int,
    model: torch.nn.Module,
    optimizer: TrainOptimizer,
    data: Sequences,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Return the sequences per micro-batch, a power of two or `at_most`; equal on all processes.

    The trials run the eager model on training data (a compiled model needs less), keep the gradients as training does,
    and leave nothing behind. Room for the optimizer's state is reserved. A size is tried only when, extrapolated from
    those before, it should fit: on a CPU the system kills a process that allocates too much.
    UserError: not one sequence fits, or the free memory is unknown.
    """
    free = memory.available(device)
    if free is None:
        raise UserError(
            f"--max_batch_size=0: the free memory on {device.type} is unknown here: give a number of sequences"
        )
    _, gradients, moments = memory.process_bytes(model, optimizer)
    room = int(SHARES.get(device.type, HOST_SHARE) * free) - gradients - moments
    base = memory.allocated(device) + gradients

    def bytes_for(count: int) -> int:
        sequences = [data.sequence(i % len(data)) for i in range(count)]
        batch = collate(sequences, data.with_doc_ids)
        memory.reset_peak_memory(device)
        with autocast():
            _, loss, _ = model(**to_device(batch, device))
        loss.backward()
        return memory.peak_memory(device) - base

    try:
        found, used = largest_fit(at_most, room, bytes_for)
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not found:
        raise UserError(
            f"not even one sequence of {data.seq_len} tokens fits the {format_bytes(free)} that are free on "
            f"{device.type}: lower --max_seq_len, or train a smaller model"
        )
    log(f"micro-batch: {found} sequences fit ({format_bytes(max(0, used))} of {format_bytes(max(0, room))})")
    return found


def largest_fit(at_most: int, room: int, bytes_for: Callable[[int], int]) -> tuple[int, int]:
    """The largest of 1, 2, 4 ... and at_most for which bytes_for(count) <= room, and its bytes; (0, 0) without one.

    bytes_for may run out of memory. All processes try the same sizes, and stop at the same one.
    """
    sizes = [2**k for k in range(at_most.bit_length()) if 2**k < at_most] + [at_most]
    tried = [(0, 0)]
    for size in sizes:
        if on_any_process(extrapolated(tried, size) > room):
            break
        try:
            used = bytes_for(size)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            used = room + 1
        if on_any_process(used > room):
            break
        tried.append((size, used))
    return tried[-1]


def on_any_process(condition: bool) -> bool:
    return bool(process_group.sum_numbers([condition])[0])


def extrapolated(tried: list[tuple[int, int]], size: int) -> float:
    """Bytes for `size` sequences on the line through the last two (size, bytes) tried; 0 before there are two."""
    if len(tried) < 2:
        return 0
    (a, used_a), (b, used_b) = tried[-2:]
    return used_b + (size - b) * max(0, used_b - used_a) / (b - a)
