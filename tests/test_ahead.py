"""What a library of a decode step takes the sizes of a state for."""

import pytest

from model.kernels.ahead import _role, size_of

LENGTHS = (320, 160)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 32, 128])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_slots_per_several_tokens_follow_the_length(n, more):
    role = _role(tuple(-(-length // n) + more for length in LENGTHS), LENGTHS)
    for length in (4, 255, 256, 1000):
        assert size_of(role, {"length": length, "sequences": 3}) == -(-length // n) + more


def test_a_ring_has_one_size_and_an_unknown_one_fits_no_other_length():
    assert _role((136, 136), LENGTHS) == 136 == size_of(136, {"length": 9, "sequences": 3})
    assert _role((325, 165), LENGTHS) == 325
    assert size_of("sequences", {"length": 9, "sequences": 3}) == 3
