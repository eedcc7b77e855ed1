"""Faster forms of the layers, for some devices and sizes. Nothing here is needed to understand a model.

A function of model/layers/ that has a faster form carries `@dispatch(faster)`. MINI_LLM_KERNELS=0 in the environment
turns every form off: the same results up to rounding, but slower and with more memory.
"""

import functools
import os

ENABLED = os.environ.get("MINI_LLM_KERNELS", "1") != "0"


def dispatch(faster):
    """Decorate a plain function by `faster(plain, *inputs)`, which returns the same as `plain(*inputs)`.

    `faster` looks at the inputs and calls `plain` where nothing is faster.
    """

    def decorate(plain):
        if not ENABLED:
            return plain

        @functools.wraps(plain)
        def dispatched(*args, **kwargs):
            return faster(plain, *args, **kwargs)

        return dispatched

    return decorate
