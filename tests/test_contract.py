"""The checks of check_model.py over every registered model, and over the template that authors start from."""

import functools

import pytest

from checks import CHECKS, SLOW, ModelUnderTest
from checks.harness.runner import run_check
from model import list_models, template
from tests.support.models import EXPECTED_SKIPS, TEMPLATE_SKIPS

TEMPLATE = "the template"
PINNED = {**EXPECTED_SKIPS, TEMPLATE: TEMPLATE_SKIPS}


@functools.cache
def model_under_test(name):
    if name == TEMPLATE:
        return ModelUnderTest.of(template.TemplateModel, template.TemplateModelArgs)
    return ModelUnderTest(name)


def marked(check):
    return pytest.param(check, marks=pytest.mark.slow) if check.startswith(SLOW) else check


@pytest.mark.parametrize("check", [marked(check) for check in CHECKS])
@pytest.mark.parametrize("name", [*list_models(), TEMPLATE])
def test_contract(name, check):
    """Every check passes, or does not apply; for the models that ship it is fixed which do not apply."""
    result = run_check(model_under_test(name), check)
    assert result.status != "fail", result.detail
    if name in PINNED:
        assert (result.status == "skip") == (check in PINNED[name]), f"{result.status}: {result.detail}"
    if result.status == "skip":
        pytest.skip(result.detail)


def test_expected_skips_name_checks_and_models():
    assert set(EXPECTED_SKIPS) <= set(list_models())
    assert set().union(*PINNED.values()) <= set(CHECKS)
