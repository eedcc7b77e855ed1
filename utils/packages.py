"""Packages that only some commands need."""

import importlib.util

from utils.errors import UserError


def require_packages(*names: str, change: str) -> None:
    """UserError, ending in `change`, unless all these packages can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed: {change}")
