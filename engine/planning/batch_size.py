"""How many rows fit the device in one forward and backward pass: tried, 1, 2, 4 ... rows, before the training."""

import torch

from engine.data.loader import collate, to_device
from engine.distributed import process_group
from engine.planning import memory
from engine.runs.checkpoint_manager import process_bytes
from utils.errors import UserError
from utils.log import format_bytes, log

# What part of the free memory may be used. The rest is for fragments: on a processor the allocator of the system keeps
# much of what was freed, and after some steps a process holds up to 1.8 times what the trial took (docs/LOG.md).
SHARES, SHARE_OF_HOST = {"cuda": 0.9}, 0.5


def find_max_batch_size(at_most: int, model, optimizer, rows, device, autocast) -> int:
    """Return the rows of a micro-batch, a power of two or `at_most`; the same on all processes.

    The trials use rows of the training data in the eager model (compiled it needs less), keep the gradients as a
    training does, and leave nothing behind. Room for the optimizer's state is set aside. A size is tried only when,
    going by those before, it should fit: on a CPU the system ends a process that takes too much.
    UserError when one row does not fit, or when the system does not tell how much memory is free.
    """
    free = memory.available(device)
    if free is None:
        raise UserError(
            f"--max_batch_size=0: how much memory is free on {device.type} is not known here: give a number of rows"
        )
    _, gradients, moments = process_bytes(model, optimizer)
    room = int(SHARES.get(device.type, SHARE_OF_HOST) * free) - gradients - moments
    base = memory.held(device) + gradients

    def bytes_for(count: int) -> int:
        batch = collate([rows.row(i % len(rows)) for i in range(count)], rows.with_doc_ids, rows.file.pad_id)
        memory.reset_peak_memory(device)
        with autocast():
            _, loss, _ = model(**to_device(batch, device))
        loss.backward()
        return memory.peak_memory(device) - base

    try:
        found, used = largest(at_most, room, bytes_for)
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not found:
        raise UserError(
            f"not even one row of {rows.seq_len} tokens fits the {format_bytes(free)} that are free on "
            f"{device.type}: lower --max_seq_len, or train a smaller model"
        )
    log(f"micro-batch: {found} rows fit ({format_bytes(max(0, used))} of {format_bytes(max(0, room))})")
    return found


def largest(at_most: int, room: int, bytes_for) -> tuple[int, int]:
    """The largest of 1, 2, 4 ... and at_most for which bytes_for(count) <= room, and its bytes; (0, 0) without one.

    bytes_for may run out of memory. All processes go through the same sizes, and stop at the same one.
    """
    sizes = [2**k for k in range(at_most.bit_length()) if 2**k < at_most] + [at_most]
    tried = [(0, 0)]
    for size in sizes:
        if somewhere(expected(tried, size) > room):
            break
        try:
            used = bytes_for(size)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            used = room + 1
        if somewhere(used > room):
            break
        tried.append((size, used))
    return tried[-1]


def somewhere(condition: bool) -> bool:
    """Whether it holds on any process."""
    return bool(process_group.sum_numbers([condition])[0])


def expected(tried: list[tuple[int, int]], size: int) -> float:
    """Bytes for `size` rows on the straight line through the last two of the sizes tried; 0 before the first."""
    if len(tried) < 2:
        return 0
    (a, used_a), (b, used_b) = tried[-2:]
    return used_b + (size - b) * max(0, used_b - used_a) / (b - a)
