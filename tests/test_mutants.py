"""Mutation tests of the checks: each mutant fails its check, and every correct model passes all of them."""

import pytest
import torch.nn.functional as F

from checks import CHECKS, SLOW, ModelUnderTest
from checks.harness.runner import BUILDS, open_classes, run_check
from model import BaseModel, get_model_and_args
from tests.mutants import (
    unusual,
    unusual_layers,
    wrong_attention,
    wrong_contract,
    wrong_entries,
    wrong_gradients,
    wrong_learning,
    wrong_loss,
    wrong_packing,
    wrong_recurrence,
    wrong_routes,
    wrong_state,
    wrong_weights,
    wrong_windows,
)
from tests.mutants.right import (
    SLOW_MUTANTS,
    SLOW_UNUSUAL,
    UNUSUAL,
    WRONG,
    FeedForward,
    RightModel,
    RightModelArgs,
    with_defaults,
)
from tests.mutants.wrong_gradients import LEARNS
from tests.support.models import BASE_MODEL

MODULES = (
    unusual, unusual_layers, wrong_attention, wrong_contract, wrong_entries, wrong_gradients, wrong_learning,
    wrong_loss, wrong_packing, wrong_recurrence, wrong_routes, wrong_state, wrong_weights, wrong_windows,
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_MUTANTS else n for n in WRONG])
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


def of_models(name):
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW_UNUSUAL else name


@pytest.mark.parametrize("check", [slow(check) for check in CHECKS])
@pytest.mark.parametrize("name", [of_models(name) for name in UNUSUAL])
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


@pytest.mark.parametrize("name", [n for n in WRONG if WRONG[n][2] == "gradients.backward_is_deterministic"])
def test_a_random_backward_pass_is_no_wrong_sum_of_losses(name):
    """One fault, one name: the checks that compare gradients do not blame what they look at."""
    tested = ModelUnderTest.of(*WRONG[name][:2])
    sum_of_terms = run_check(tested, "contract.loss_is_sum_of_terms")
    assert sum_of_terms.status == "pass", sum_of_terms
    for check in ("gradients.agree_with_finite_differences", "loss.ignored_targets_have_no_gradient"):
        result = run_check(tested, check)
        assert result.status == "skip" and "two backward passes differ" in result.detail, result


@pytest.mark.parametrize("balance, check", [(1e-3, "moe.routers_have_a_task_gradient"), (0.0, LEARNS)])
def test_one_active_expert_of_a_shipped_model_has_a_router_that_does_not_learn(balance, check):
    """Its weight is divided by itself: with one active expert, norm_topk has to be off."""
    Model, ModelArgs = get_model_and_args(BASE_MODEL)
    alone = with_defaults(ModelArgs, n_activated_experts=1, seq_aux_alpha=balance)
    result = run_check(ModelUnderTest.of(Model, alone), check)
    assert result.status == "fail" and "router" in result.detail, result
    right = with_defaults(ModelArgs, n_activated_experts=1, seq_aux_alpha=balance, norm_topk=False)
    result = run_check(ModelUnderTest.of(Model, right), check)
    assert result.status == "pass", result


def test_a_parameter_that_is_cancelled_passes_once_it_is_frozen():
    """So a published layout with a bias of keys can be kept."""

    class Frozen(wrong_gradients.BiasOfKeysWithoutPositions):
        def make_more(self):
            for layer in self.layers:
                layer.attn.k_bias.requires_grad_(False)

    wrong = run_check(ModelUnderTest.of(*WRONG["BiasOfKeysWithoutPositions"][:2]), LEARNS)
    assert "k_bias vanishes" in wrong.detail and "in float64" in wrong.detail, wrong
    result = run_check(ModelUnderTest.of(Frozen, RightModelArgs), LEARNS)
    assert result.status == "pass", result


class EveryActivation(FeedForward):
    """The sum of activations that are often used; F.softplus has no backward in place that the compiler could trace."""

    def forward(self, x):
        h = self.up_proj(x)
        smooth = F.softplus(h) + F.gelu(h, approximate="tanh") + F.silu(h) + F.mish(h) + F.logsigmoid(h) + F.elu(h)
        return self.down_proj(smooth + F.hardswish(h) + F.leaky_relu(h) + F.relu(h).square() + F.celu(h) + F.selu(h))


@pytest.mark.slow
def test_activations_compile():
    model = type("EveryActivationModel", (RightModel,), {"FFN": EveryActivation})
    result = run_check(ModelUnderTest.of(model, RightModelArgs), "precision.compiled_equals_eager")
    assert result.status == "pass", result
