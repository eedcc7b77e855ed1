"""Builds the C++ decode kernels (decode.cpp) for this machine, once, and loads them."""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.errors import ModelError

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = (  # sums may be reordered, but NaN and infinity keep their meaning
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-Wno-psabi",
)
OTHERWISE = "or leave out --compile"


def load_extension():
    """Register the operators of decode.cpp, which is compiled first where that has not happened yet.

    The library is kept in a folder of the user, under a name that holds a digest of the source, the flags, PyTorch and
    the CPU. Raises `ModelError` without a compiler or ninja, and for a folder that cannot be used.
    """
    compiler = find_compiler()
    flags = [*compiler[1:], *FLAGS]
    key = "\n".join(
        (
            compiler[0],
            *flags,
            *_openmp(compiler),
            torch.__version__,
            cpu_description(),
            SOURCE.read_text(encoding="utf-8"),
        )
    )
    name = f"mini_llm_decode_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = private_folder()
    library = folder / f"{name}.so"
    try:
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            _build_and_load(name, compiler, flags, folder)
    except OSError as error:
        raise ModelError(
            f"cannot load or write {library} ({error}): delete it, name another folder by XDG_CACHE_HOME=..., "
            f"{OTHERWISE}"
        ) from error


def _build_and_load(name, compiler, flags, folder):
    """Compile in a folder of this process, so that two processes may build at once and a killed one leaves no lock."""
    with tempfile.TemporaryDirectory(dir=folder) as build_folder, _build_environment(compiler):
        if shutil.which("ninja") is None:
            raise ModelError(f"the compiled decode step needs ninja, and there is none: pip install ninja, {OTHERWISE}")
        from torch.utils import cpp_extension  # imports setuptools

        try:
            cpp_extension.load(
                name,
                [str(SOURCE)],
                extra_cflags=[*flags, *_openmp(compiler)],
                extra_ldflags=[*compiler[1:], *_openmp(compiler)],
                build_directory=build_folder,
                is_python_module=False,
            )
        except (RuntimeError, subprocess.SubprocessError) as error:
            raise ModelError(
                f"{compiler[0]} could not compile {SOURCE.name}: name another compiler by CXX=..., {OTHERWISE}. "
                f"The end of its output: {' '.join(str(error).split())[-300:]}"
            ) from error
        os.replace(Path(build_folder, f"{name}.so"), folder / f"{name}.so")


def find_compiler():
    """Return the C++ compiler as a list of arguments: CXX, or the first of the usual ones."""
    compiler = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), ""))
    if not compiler:
        raise ModelError(
            "the compiled decode step needs a C++ compiler, and there is none: install g++ or clang++ "
            f"(Debian: apt install g++), {OTHERWISE}"
        )
    if shutil.which(compiler[0]) is None:
        raise ModelError(f"CXX={compiler[0]}: there is no such program; name another compiler, {OTHERWISE}")
    return compiler


def _openmp(compiler):
    """GNU's OpenMP, whose threads PyTorch uses. Another OpenMP would start a second pool, so then there is none."""
    return [] if sys.platform == "darwin" or "clang" in " ".join(compiler) else ["-fopenmp"]


def private_folder(*parts):
    """Return the folder of the libraries, or one in it: only the user may write there, since they are executed."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mini_llm"
    except RuntimeError:
        raise ModelError(
            f"there is no home folder to keep compiled code in: name a folder by XDG_CACHE_HOME=..., {OTHERWISE}"
        ) from None
    _make_private(folder)
    for part in parts:
        folder = folder / part
        _make_private(folder)
    return folder


def _make_private(folder):
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ModelError(
            f"cannot keep compiled code in {folder} ({error.strerror}): name a folder that can be written by "
            f"XDG_CACHE_HOME=..., {OTHERWISE}"
        ) from error
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if os.name == "posix" and (shared or status.st_uid != os.getuid()):
        raise ModelError(
            f"{folder} may be written by other users, so no library is loaded from there: chmod 700 it, or name a "
            f"folder of your own by XDG_CACHE_HOME=..., {OTHERWISE}"
        )


@contextmanager
def _build_environment(compiler):
    """Name the compiler to cpp_extension, and put the programs of this Python's packages (ninja) on the path."""
    before = dict(os.environ)
    os.environ["CXX"] = compiler[0]
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def cpu_description():
    """Describe what -march=native depends on: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
