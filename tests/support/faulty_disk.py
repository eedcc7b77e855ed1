"""A disk that fails: a fault at any system call of a save, and a file system with little room."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

CALLS = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "rmdir", "unlink")  # all that a save uses


class Died(BaseException):
    """Simulates the end of the process: not an Exception, and nothing touches the disk after it."""


class FaultyOS:
    """Takes the place of the calls in CALLS, and lets call `at` fail.

    fails: with an error, once. full: it and each later one that needs room. short: a write takes a single byte.
    dies: before the call. dies after: it. dies within: a write, half of it done.
    """

    def __init__(self, patch, at=-1, fault=""):
        self.at, self.fault, self.count, self.dead, self.names = at, fault, 0, False, []
        for name in CALLS:
            patch.setattr(os, name, self.stand_in(name, getattr(os, name)))

    def stand_in(self, name, call):
        def called(*args, **kwargs):
            if self.dead:
                raise Died
            now, self.count = self.count == self.at, self.count + 1
            self.names.append(name)
            needs_room = name in ("write", "mkdir") or (name == "open" and args[1] & os.O_CREAT)
            if self.fault == "full" and self.count > self.at and needs_room:
                raise OSError(errno.ENOSPC, "No space left on device")
            if now and self.fault == "fails":
                raise OSError(errno.EIO, "Input/output error")
            if now and self.fault == "short" and name == "write":
                return call(args[0], args[1][:1])
            if now and self.fault.startswith("dies"):
                self.dead = True
                if self.fault == "dies within" and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                if self.fault == "dies after":
                    call(*args, **kwargs)
                raise Died
            return call(*args, **kwargs)

        return called


def mount_small(folder: Path, size: str) -> bool:
    folder.mkdir()
    return (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
