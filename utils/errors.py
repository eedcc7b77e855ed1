"""Errors that are the user's to mend: one line that says what, why, and what to change."""

import atexit
import errno
import os
import sys

DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quota


class UserError(ValueError):
    """A mistake in a command, a file or a setting; the message is one line."""


class ModelError(UserError):
    """A mistake in the sizes of a model, in its file or in its inputs; the message is one line."""


def require(condition: bool, message: str) -> None:
    """Raise `ModelError(message)` unless the condition holds."""
    if not condition:
        raise ModelError(message)


def leave() -> None:
    """End a process of a group well, and without taking the interpreter down.

    The threads of gloo outlive the group (DTensor's caches keep it). One that lets go of a tensor while the interpreter
    goes down aborts the process, and torchrun calls a finished run failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_script(main) -> None:
    """Call main() and end the process: 0; 2, with one line on stderr, after a user's error, for a path that cannot be
    used, a full disk, or out of memory; 130 after Ctrl-C."""
    for out in (sys.stdout, sys.stderr):
        if hasattr(out, "reconfigure"):
            out.reconfigure(errors="replace")  # where the locale knows no Chinese, a ? and no UnicodeEncodeError
    try:
        main()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:  # PyTorch's own class is not imported here: it takes seconds
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            raise
        said = str(error).partition("\n")[0]
        print(
            f"error: out of memory ({said}): fewer rows at once (--max_batch_size; 0 finds what fits), shorter ones "
            "(--max_seq_len), or a smaller model",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(2) from None
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
        change = "make room, and run the same command again" if full else "choose another path, or mend this one"
        print(f"error: {what}: {error.strerror}: {change}", file=sys.stderr)
        raise SystemExit(2) from None
