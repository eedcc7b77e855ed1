"""Mutation tests of the checks: each mutant fails its check, and every correct model passes all of them."""

import pytest

from checks import CHECKS, SLOW, ModelUnderTest
from checks.harness.runner import BUILDS, open_classes, run_check
from model import BaseModel
from tests.mutants import (
    unusual,
    wrong_attention,
    wrong_contract,
    wrong_learning,
    wrong_loss,
    wrong_packing,
    wrong_state,
    wrong_weights,
)
from tests.mutants.right import UNUSUAL, WRONG

MODULES = (
    unusual, wrong_attention, wrong_contract, wrong_learning, wrong_loss, wrong_packing, wrong_state, wrong_weights,
)  # fmt: skip


def compiles(name):
    return WRONG[name][2] == "precision.compiled_equals_eager"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if compiles(n) else n for n in WRONG])
def test_a_mutant_is_caught_by_its_check(name):
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
def test_correct_models_pass_every_check(tested_models, name, check):
    result = run_check(tested_models[name], check)
    assert result.status != "fail", result


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_model_of_these_files_is_registered(module):
    """A model without its decorator would be tested by nothing. Those that others are made from need none."""
    models = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, BaseModel)]
    own = {cls.__name__ for cls in models if cls.__module__ == module.__name__ and not cls.__subclasses__()}
    assert own and not own - WRONG.keys() - UNUSUAL.keys()


def test_every_check_catches_a_mutant():
    caught = {check for _, _, check in WRONG.values()}
    assert not set(CHECKS) - caught, "no mutant fails these checks"
