"""Mutants, which are correct models with one bug, and correct but unusual models: the tests of the checks.

`right.py` is the base; a mutant overrides one method of it and names the check that must fail.
"""
