"""Memory, in bytes: what this process holds on its device, the most it has held, and what is left for it.

On CUDA what PyTorch has allocated; elsewhere the resident set of the process, Python and its libraries included.
"""

import os
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

PROC = Path("/proc")


def held(device: torch.device) -> int:
    """Bytes held now; where the system does not tell, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = PROC / "self/statm"
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held since the last `reset_peak_memory`; 0 where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = PROC / "self/status"
    if status.is_file():  # not what `resource` says there: it counts what the process was before its exec, too
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on; where the system does not allow it, it goes on counting from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    except OSError:
        pass


def available(device: torch.device) -> int | None:
    """Bytes that this process can still take, its fair share where processes share a machine's memory; or None."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = PROC / "meminfo"
    if not meminfo.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    limits = [group_limit(folder) for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))]
    free = min([free, *(limit for limit in limits if limit is not None)])
    return min(free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), process_limit())


def group_limit(folder: Path) -> int | None:
    """What a control group (a container's, say) leaves: its limit less its use; None without a limit."""
    for limit, use in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            return int((folder / limit).read_text()) - int((folder / use).read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return None


def process_limit() -> float:
    """What `ulimit -v` leaves this process of its address space; infinite without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return limit - int((PROC / "self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def ran_out(error: RuntimeError) -> bool:
    """Whether it says that memory ran out: on the processor PyTorch has no error class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
