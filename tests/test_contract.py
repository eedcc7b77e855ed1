"""Every check over every registered model, and the template that authors start from."""

import pytest

from checks import CHECKS, NotApplicable, Subject
from model import list_models


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", list_models())
def test_contract(name, check):
    try:
        CHECKS[check](Subject(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))
