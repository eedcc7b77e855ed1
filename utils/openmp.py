"""Lets idle OpenMP threads sleep soon, when it is imported before PyTorch, whose OpenMP reads these as it loads.

By default an idle thread spins for milliseconds in case more work comes. On a core that another program uses as well,
it spins away the time that the next operator needs there, and the other threads wait for that. Sleeping at once is no
better: on idle cores a training is a quarter slower, since the threads are woken for every operator. So they spin for
a short while, which covers the gap between two operators (docs/LOG.md, 2026-11-29).
"""

import os

WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",  # libomp and Intel's
    "GOMP_SPINCOUNT": "3000",  # libgomp, which takes it before the policy; its default is 300,000
}
OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

if not any(name in os.environ for name in OF_THE_USER):
    os.environ.update(WAITING)
