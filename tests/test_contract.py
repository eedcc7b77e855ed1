"""The checks of check_model.py over every registered model, and over the template that authors start from."""

import functools

import pytest

from checks import CHECKS, SLOW, Subject
from checks.runner import run_check
from model import list_models, template

TEMPLATE = "the template"
MODELS = [*list_models(), TEMPLATE]


@functools.cache
def subject(name):
    return Subject.of(template.TemplateModel, template.TemplateModelArgs) if name == TEMPLATE else Subject(name)


def marked(check):
    return pytest.param(check, marks=pytest.mark.slow) if check.startswith(SLOW) else check


@pytest.mark.parametrize("check", [marked(check) for check in CHECKS])
@pytest.mark.parametrize("name", MODELS)
def test_contract(name, check):
    result = run_check(subject(name), check)
    assert result.status != "fail", result.detail
    if result.status == "skip":
        pytest.skip(result.detail)


def test_no_check_is_skipped_by_every_model():
    """A check that never runs proves nothing; skipping is decided from the signature and a look, so that is quick."""
    names = [check for check in CHECKS if not check.startswith(SLOW)]
    idle = [check for check in names if all(run_check(subject(name), check).status == "skip" for name in MODELS)]
    assert not idle, f"skipped by every model: {idle}"
