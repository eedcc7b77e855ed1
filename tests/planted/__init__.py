"""Architectures that are right but for one planted bug, and others that are right but unusual: what the checks are judged by.

`right.py` is the base; a plant overrides one piece of it, in a few lines, and says by which check it must be caught.
"""
