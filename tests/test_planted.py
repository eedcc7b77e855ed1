"""The checks themselves: each planted bug is caught by the check that should catch it, and nothing right is blamed."""

import pytest

from checks import CHECKS, SLOW, ModelUnderTest
from checks.harness.runner import BUILDS, open_classes, run_check
from tests.planted import (
    unusual,
    wrong_attention,
    wrong_contract,
    wrong_learning,
    wrong_loss,
    wrong_packing,
    wrong_state,
)
from tests.planted import wrong_weights as _
from tests.planted.right import UNUSUAL, WRONG

assert all((unusual, wrong_attention, wrong_contract, wrong_learning, wrong_loss, wrong_packing, wrong_state, _))


def compiles(name):
    return WRONG[name][2] == "precision.compiled_equals_eager"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if compiles(n) else n for n in WRONG])
def test_a_planted_bug_is_caught_by_name(name):
    Model, ModelArgs, check = WRONG[name]
    tested, result = open_classes(Model, ModelArgs)
    if tested is not None:
        assert check != BUILDS, "it was to fail when built"
        result = run_check(tested, check)
    assert (result.check, result.status) == (check, "fail"), result
    assert "checks/" not in result.detail and len(result.detail) > 20, result


@pytest.fixture(scope="module")
def tested_models():
    return {name: ModelUnderTest.of(*pair) for name, pair in UNUSUAL.items()}


def slow(check):
    return pytest.param(check, marks=pytest.mark.slow) if check.startswith(SLOW) else check


@pytest.mark.parametrize("check", [slow(check) for check in CHECKS])
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_right_is_not_blamed(tested_models, name, check):
    result = run_check(tested_models[name], check)
    assert result.status != "fail", result


def test_there_are_enough_of_both():
    assert len(WRONG) >= 30 and len(UNUSUAL) >= 8


def test_every_check_catches_a_planted_bug():
    caught = {check for _, _, check in WRONG.values()}
    assert not set(CHECKS) - caught, "nothing shows that these checks can fail"
