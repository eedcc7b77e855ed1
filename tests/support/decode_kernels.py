"""Whether the C++ decode kernels can be built here."""

import os
import shutil
import sysconfig


def why_not_built():
    """Return what is missing for a build, or an empty string."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "c++"))):
        return "needs a C++ compiler"
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    return "" if shutil.which("ninja", path=path) else "needs ninja"
