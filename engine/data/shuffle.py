"""The order of the data: a seeded permutation that is computed, never stored."""

import numpy as np


def shuffled(position: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map `position` (int64 array, 0..n-1) through the permutation of an epoch, a function of (seed, epoch) alone.

    Four Feistel rounds over the smallest even number of bits that holds n. A value that lands at n or above is mapped
    again (cycle walking), so the result is a permutation of 0..n-1.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    value = position.astype(np.uint64)
    out = np.empty(len(position), np.uint64)
    pending = np.arange(len(position))
    while len(pending):
        left, right = value >> np.uint64(half), value & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        value = (left << np.uint64(half)) | right
        inside = value < n
        out[pending[inside]] = value[inside]
        pending = pending[~inside]
        value = value[~inside]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
