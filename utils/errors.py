"""Errors that the user can fix: one line with what, why, and what to change."""

import atexit
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota


class UserError(ValueError):
    """A mistake in a command, a file or a setting; the message is one line."""


class ModelError(UserError):
    """A mistake in the sizes of a model, in its file or in its inputs; the message is one line."""


def require(condition: bool, message: str) -> None:
    """Raise `ModelError(message)` unless the condition holds."""
    if not condition:
        raise ModelError(message)


def exit_rank() -> None:
    """End a process of a process group with exit code 0 and without interpreter teardown.

    Threads of gloo outlive the group (DTensor's caches hold it). One that frees a tensor during the teardown aborts the
    process, and torchrun then reports a finished run as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_script(main: Callable[[], object]) -> None:
    """Call main() and exit: 0 on success, 130 after Ctrl-C, 2 with one line on stderr for what the user can fix.

    That is a UserError, a path that cannot be used, a full disk, or out of memory.
    """
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")  # a locale without Chinese prints ?, and raises no UnicodeEncodeError
    try:
        main()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            exit_rank()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        _fail(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        _fail(
            f"error: out of memory ({reason}): fewer sequences at once (--max_batch_size; 0 finds what fits), shorter "
            "ones (--max_seq_len), or a smaller model"
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `python x.py --help | head` is no error
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        full = error.errno in DISK_FULL
        if error.filename is None and not full:  # not about a path
            raise
        what = error.filename or "a file could not be written"
        change = "make room, and run the same command again" if full else "choose another path, or fix this one"
        _fail(f"error: {what}: {error.strerror}: {change}")


def _fail(line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """By name: importing PyTorch's own class takes seconds."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
