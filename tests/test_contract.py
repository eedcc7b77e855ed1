"""The checks of check_model.py over every registered model, and over the template that authors start from."""

import functools

import pytest

from checks import CHECKS, SLOW, ModelUnderTest
from checks.harness.runner import run_check
from model import list_models, template

TEMPLATE = "the template"


@functools.cache
def tested(name):
    return (
        ModelUnderTest.of(template.TemplateModel, template.TemplateModelArgs)
        if name == TEMPLATE
        else ModelUnderTest(name)
    )


def marked(check):
    return pytest.param(check, marks=pytest.mark.slow) if check.startswith(SLOW) else check


@pytest.mark.parametrize("check", [marked(check) for check in CHECKS])
@pytest.mark.parametrize("name", [*list_models(), TEMPLATE])
def test_contract(name, check):
    result = run_check(tested(name), check)
    assert result.status != "fail", result.detail
    if result.status == "skip":
        pytest.skip(result.detail)
