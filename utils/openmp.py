"""Lets idle OpenMP threads sleep, when it is imported before PyTorch, whose OpenMP reads these variables as it loads.

By default an idle thread spins for milliseconds in case more work comes. On a core that another program uses as well,
it spins away the time that the next operator needs there, and the other threads wait for that.
"""

import os

WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}  # libgomp, libomp and Intel's
OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

if not any(name in os.environ for name in OF_THE_USER):
    os.environ.update(WAITING)
