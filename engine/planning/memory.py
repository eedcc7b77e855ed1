"""Memory in bytes: what this process has allocated, its peak, what is free, and what training a model needs.

On CUDA it is what PyTorch has allocated; elsewhere the resident set of the process, Python and its libraries included.
"""

import os
import sys
from pathlib import Path

import torch

from engine.distributed.fsdp import local
from engine.runs.checkpoint_manager import checkpoint_bytes
from engine.runs.protocols import TrainOptimizer

if sys.platform != "win32":
    import resource

PROC = Path("/proc")


def allocated(device: torch.device) -> int:
    """Bytes allocated now; the peak where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = PROC / "self/statm"
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes allocated since the last `reset_peak_memory`; 0 where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = PROC / "self/status"
    if status.is_file():  # not getrusage, which on Linux includes the process image before exec
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    if sys.platform == "win32":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Count `peak_memory` from now on; where the system does not allow it, from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "self/clear_refs").write_text("5")  # proc(5): resets the peak resident set
    except OSError:
        pass


def available(device: torch.device) -> int | None:
    """Bytes that this process can still allocate, its share where processes share a machine; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = PROC / "meminfo"
    if not meminfo.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    limits = [cgroup_limit(folder) for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))]
    free = min([free, *(limit for limit in limits if limit is not None)])
    process = process_limit()
    share = free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return share if process is None else min(share, process)


def cgroup_limit(folder: Path) -> int | None:
    """What a control group (e.g. a container's) leaves: its limit minus its use; None without a limit."""
    for limit, use in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            return int((folder / limit).read_text()) - int((folder / use).read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return None


def process_limit() -> int | None:
    """What `ulimit -v` leaves of the address space of this process; None without a limit."""
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return limit - int((PROC / "self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: on the CPU PyTorch has no error class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def process_bytes(model: torch.nn.Module, optimizer: TrainOptimizer) -> tuple[int, int, int]:
    """Bytes of this process's shard of weights and persistent buffers, of gradients, and of the optimizer's moments."""
    weights, full = checkpoint_bytes(model, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = sum(local(p).numel() for p in parameters)
    share = mine / sum(p.numel() for p in parameters)
    return round(weights * share), 4 * mine, round((full - weights) * share)
