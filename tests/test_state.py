"""The generic operations of State on tensors of the layers and of the full model."""

import torch

from model import State


def state_of(*rows, max_pos):
    """Two layers and the model hold one tensor each; sequence i is filled with rows[i]."""
    tensor = torch.tensor(rows, dtype=torch.float32)[:, None].repeat(1, 3)
    layers = [{"k": tensor.clone()}, {"best": tensor.clone()}]
    state = State(torch.full((len(rows),), max_pos), 9, layers, max_pos, model={"ids": tensor.clone()})
    state.rewindable.add("k")
    state.empty["best"] = -1.0
    return state


def held(state):
    return [tensor[:, 0].tolist() for part in [*state.layers, state.model] for tensor in part.values()]


def test_select_overwrite_and_clone_take_the_models_tensors_along():
    state = state_of(1, 2, 3, max_pos=4)
    assert held(state.select([2, 0])) == [[3, 1]] * 3
    copy = state.clone()
    state.overwrite([0, 2], state_of(8, 9, max_pos=6))
    assert held(state) == [[8, 2, 9]] * 3 and state.max_pos == 6 and state.pos.tolist() == [6, 4, 6]
    assert held(copy) == [[1, 2, 3]] * 3


def test_a_sequence_that_has_seen_nothing_gets_the_declared_value():
    state = state_of(1, 2, max_pos=4)
    state.overwrite([1], State(torch.zeros(1, dtype=torch.long), 9, [{}, {}]))
    assert held(state) == [[1, 0], [1, -1], [1, 0]]
    fresh = State(torch.zeros(2, dtype=torch.long), 9, [{}, {}])
    fresh.overwrite([0], state_of(5, max_pos=1))
    assert held(fresh) == [[5, 0], [5, -1], [5, 0]]


def test_only_rewindable_tensors_can_be_rewound():
    state = state_of(1, max_pos=4)
    assert not state.can_rewind() and not state.clone().can_rewind()
    state.rewindable |= {"best", "ids"}
    assert state.can_rewind() and state.select([0]).can_rewind()
    state.rewind(3)
    assert state.pos.tolist() == [1] and state.max_pos == 1


def test_a_sequence_of_states_shares_no_tensor_and_knows_the_declared_names():
    state = state_of(1, 2, max_pos=4)
    for other in (state.clone(), state.select([1, 0])):
        assert other.rewindable == {"k"} and other.empty == {"best": -1.0} and other.room == state.room
        other.layers[0]["k"].zero_()
        other.model["ids"].zero_()
    assert held(state) == [[1, 2]] * 3
