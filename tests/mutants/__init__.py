"""What the checks are judged by: architectures that are right but for one planted bug, and right but unusual ones.

`right.py` is the base; a plant overrides one piece of it, in a few lines, and says by which check it must be caught.
"""
