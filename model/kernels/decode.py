"""The kernels of a decoding step on a processor (kernels.cpp): compiled once for this machine, and kept.

What they compute is a few rows times large weights; shapes and layout are told there. They have no gradient.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.int8 import Int8Weight
from utils.errors import ModelError

SOURCE = Path(__file__).with_name("decode.cpp")
# fast sums, but a number that is not finite stays one
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-Wno-psabi",
)
OUTPUTS = 32  # side by side
PER_STEP = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # inputs side by side


_loaded = False


def load():
    """Register torch.ops.mini_llm, compiled first where it is not yet. Raises ModelError where no compiler is found."""
    global _loaded
    if _loaded:
        return
    path = _built()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ModelError(
            f"cannot load {path} ({error}): delete it, name another folder by XDG_CACHE_HOME=..., or "
            "leave out --compile"
        ) from error
    for name, fake in ("linear", _linear), ("experts", _experts), ("attend", _attend), ("visible", _visible):
        torch.library.register_fake(f"mini_llm::{name}", fake)
    _loaded = True


def _built():
    """The path of the library for this source, this PyTorch and this processor."""
    compiler = shlex.split(os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), ""))
    if not compiler:
        raise ModelError(
            "the compiled decoding step needs a C++ compiler, and there is none: install g++ or clang++ "
            "(Debian: apt install g++), or leave out --compile"
        )
    root = Path(torch.__file__).parent
    # PyTorch's threads are those of GNU's OpenMP; with another one there would be two pools of them, so there is none
    openmp = () if "clang" in " ".join(compiler) or sys.platform == "darwin" else ("-fopenmp",)
    command = [*compiler, *FLAGS, *openmp, f"-I{root}/include", str(SOURCE), f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    key = "\n".join((*command, torch.__version__, _processor(), SOURCE.read_text(encoding="utf-8")))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini_llm"
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        try:
            _compile(command, path)
        except OSError as error:
            raise ModelError(
                f"cannot keep the compiled {SOURCE.name} in {folder} ({error.strerror}): name a folder "
                "that can be written by XDG_CACHE_HOME=..., or leave out --compile"
            ) from error
    return path


def _compile(command, path):
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:  # whoever is killed here leaves no half library
        built = Path(beside, path.name)
        try:
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            said = " ".join(done.stderr.split())[:300] if done.returncode else ""
        except FileNotFoundError:
            said = "there is no such program"
        if said or not built.exists():
            raise ModelError(
                f"{command[0]} could not compile {SOURCE.name}: name another compiler by CXX=..., or "
                f"leave out --compile. It says: {said}"
            )
        os.replace(built, path)


def _processor():
    """What -march=native depends on: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def pack(weight):
    """Lay out a weight (..., F, D), fp32, bf16 or int8, as the kernels read it: (..., F / 32, steps, 32, a step's)."""
    per_step = PER_STEP[weight.dtype]
    weight = F.pad(weight, (0, -weight.shape[-1] % per_step, 0, -weight.shape[-2] % OUTPUTS))
    return weight.unflatten(-1, (-1, per_step)).unflatten(-3, (-1, OUTPUTS)).transpose(-3, -2).contiguous()


class Packed(nn.Module):
    """A weight (..., F, D) packed, for inference: plain, or at 8 bits with the scale of each output."""

    def __init__(self, weight, scale=None):
        super().__init__()
        self.n_outputs = weight.shape[-2]
        self.register_buffer("weight", pack(weight), persistent=False)
        scale = None if scale is None else F.pad(scale.float(), (0, -self.n_outputs % OUTPUTS))
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def of(cls, weight):
        """Pack a tensor or an `Int8Weight`; None where the kernels have no product for its type."""
        if isinstance(weight, Int8Weight):
            return cls(weight.q, weight.scale) if weight.scale.dtype == torch.bfloat16 else None
        return cls(weight.detach()) if weight.dtype in PER_STEP else None

    def forward(self, x):
        """x (..., D) times the weight (F, D) -> (..., F)."""
        return torch.ops.mini_llm.linear(x, self.weight, self.scale, self.n_outputs)


class PackedLinear(nn.Module):
    """An `nn.Linear` or `Int8Linear` by the kernels."""

    def __init__(self, linear, packed):
        super().__init__()
        self.linear, self.packed = linear, packed

    def __getattr__(self, name):
        """What else there is to know of a Linear: weight, bias, in_features, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.linear, name)

    def forward(self, x):
        out = self.packed(x)
        return out if self.linear.bias is None else out + self.linear.bias


class PackedSwiGLU(nn.Module):
    """A SwiGLU by the kernels: its three products are those of a mixture's only expert."""

    def __init__(self, swiglu, parts):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj
        self.matrices = nn.ModuleList(parts)

    def forward(self, x):
        gate, up, down = self.matrices
        rows = x.reshape(-1, x.shape[-1])
        return packed_experts(rows, rows.new_zeros(len(rows), 1, dtype=torch.long), gate, up, down).view_as(x)


def packed_experts(x, chosen, gate, up, down):
    """x (N, D), chosen (N, A), `Packed` stacks of experts, or of one -> (N, A, D), each row through its chosen ones."""
    matrices = [packed.weight if packed.weight.ndim == 5 else packed.weight[None] for packed in (gate, up, down)]
    return torch.ops.mini_llm.experts(x, chosen, matrices, [p.scale for p in (gate, up, down) if p.scale is not None])


def one_query_attention(q, k, v, mask, scale):
    """Attention of one query a row: q (B, 1, H, K), k (B, S, G, K), v (B, S, G, Kv), mask bool (B, 1, 1, S), in which
    each row sees a key at least -> (B, 1, H, Kv). Keys behind the last one that a row sees are not read."""
    return torch.ops.mini_llm.attend(q, k, v, mask, scale)


def visible_keys(positions, n_keys):
    """Return which keys queries at `positions` (B, T) int64 see: those up to there, bool (B, 1, T, S). For the compiler
    it is one operator, else it would put the comparison into every layer."""
    return torch.ops.mini_llm.visible(positions, n_keys)


def in_use(*tensors):
    """Whether the kernels are to be used for these, here and now: in a compiled program on the CPU that keeps no graph,
    as a step of decoding, once they are loaded."""
    return (
        _loaded
        and torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(x.device.type == "cpu" for x in tensors)
    )


def can_attend(*tensors):
    """Whether `one_query_attention` takes these, here and now."""
    dtype = tensors[0].dtype
    return in_use(*tensors) and dtype in (torch.float32, torch.bfloat16) and all(x.dtype == dtype for x in tensors)


def _linear(x, weight, scale, n_outputs):
    return x.new_empty(*x.shape[:-1], n_outputs)


def _experts(x, chosen, matrices, scales):
    return x.new_empty(*chosen.shape, x.shape[-1])


def _attend(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _visible(positions, n_keys):
    return positions.new_empty(positions.shape[0], 1, positions.shape[1], n_keys, dtype=torch.bool)
