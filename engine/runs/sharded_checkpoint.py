"""Sharded checkpoints, written and read by all processes: torch.distributed.checkpoint with safetensors files.

Process n of N writes <kind>-0000n-of-0000N.safetensors for each kind of tensor. The kind is the first component of a
tensor's name: `model.norm.weight` is of the kind model. The header of a file lists as JSON the slices of tensors that
it holds, so nothing that is read can execute code.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.distributed.fsdp import is_dtensor, shard_like
from engine.runs.protocols import Entry, TrainOptimizer
from utils.atomic import atomic_directory, hidden, write_file
from utils.errors import UserError

Finish = Callable[[Path, list[Entry]], None]


class ShardWriter(HuggingFaceStorageWriter):
    """Writes the shards of this process; the main process creates the directory before and renames it afterwards.

    finish(directory, entries): called on the main process once all shards are written, with their manifest entries; it
    writes the other files of the directory.
    """

    def __init__(self, folder: Path, finish: Finish) -> None:
        self.directory = hidden(folder, "tmp")
        super().__init__(str(self.directory), save_distributed=True)
        self.folder = folder
        self.finish_directory = finish
        self.open_directory = ExitStack()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.open_directory.enter_context(atomic_directory(self.folder))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the parent class would create the directory here, on every process

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        kinds: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            kinds.setdefault(item.index.fqn.partition(".")[0], []).append(item)
        written = []
        for kind, items in kinds.items():
            entry = self._write_shard(kind, items, planner)
            written += [WriteResult(item.index, entry["size"], entry) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def _write_shard(self, kind: str, items: list[WriteItem], planner: SavePlanner) -> Entry:
        tensors = {}
        offsets = {}
        for item in items:
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor) and item.tensor_data is not None
            tensors[item.index.fqn] = data.detach().cpu().contiguous()
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        content = save(tensors, metadata={"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})
        name = f"{kind}-{dist.get_rank() + 1:05d}-of-{dist.get_world_size():05d}.safetensors"
        return write_file(self.directory / name, lambda file: file.write(content))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        entries = {result.storage_data["name"]: result.storage_data for shard in results for result in shard}
        self.finish_directory(self.directory, [entries[name] for name in sorted(entries)])
        self.open_directory.close()


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], finish: Finish) -> None:
    """Write a checkpoint directory from the shards of all processes, which all call it.

    finish: see `ShardWriter`. An error of one process, such as OSError, is raised on all of them, and then nothing is
    left of the directory.
    """
    writer = ShardWriter(folder, finish)
    try:
        with writer.open_directory:
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        raise first_failure(error) from None


def saved_shapes(folder: Path, prefix: str) -> dict[str, torch.Size]:
    """Return {name without `prefix`: shape} of the tensors with this prefix; UserError when they cannot be read."""
    try:
        tensors = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        shapes = {name: about.size for name, about in tensors.items() if isinstance(about, TensorStorageMetadata)}
        return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(folder, error) from None


def load_sharded(folder: Path, tensors: dict[str, torch.Tensor], collective: bool) -> None:
    """Fill tensors, full or sharded, from a directory written by any number of processes.

    collective: all processes call it together. UserError when a tensor is missing or cannot be read.
    """
    saved = saved_shapes(folder, "")
    missing = next((name for name in tensors if name not in saved), None)
    if missing:
        raise UserError(f"{folder} lacks {missing}: use another checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about reading in a single process
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not collective)
    except CheckpointException as error:
        raise unreadable(folder, first_failure(error)) from None


def split_optimizer_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split an optimizer state into (the state with names in place of DTensors, {name: DTensor})."""
    shards: dict[str, torch.Tensor] = {}

    def replace(value: Any, *path: object) -> Any:
        if not is_dtensor(value):
            return value
        name = ".".join(map(str, ("optimizer", *path)))
        shards[name] = value
        return name

    optimizers = [
        {
            **saved,
            "state": {
                index: {key: replace(value, number, index, key) for key, value in values.items()}
                for index, values in saved["state"].items()
            },
        }
        for number, saved in enumerate(state["optimizers"])
    ]
    return {"optimizers": optimizers}, shards


def merge_optimizer_state(
    state: dict[str, Any], optimizer: TrainOptimizer, folder: Path, collective: bool
) -> dict[str, Any]:
    """Undo `split_optimizer_state`: load the named tensors, and shard each tensor as its parameter is sharded here."""
    named: dict[str, torch.Tensor] = {}

    def merge(value: Any, parameter: torch.Tensor) -> Any:
        if isinstance(value, str):
            return named.setdefault(value, torch.zeros_like(parameter))
        return shard_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value

    optimizers = []
    for part, saved in zip(optimizer.all, state["optimizers"], strict=True):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        merged = {
            index: {key: merge(value, parameters[index]) for key, value in values.items()}
            for index, values in saved["state"].items()
        }
        optimizers.append({**saved, "state": merged})
    if named:
        load_sharded(folder, named, collective)
    return {"optimizers": optimizers}


def first_failure(error: CheckpointException) -> Exception:
    """The error of the first process that failed."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, Exception) else RuntimeError(repr(failure))


def unreadable(folder: Path, error: Exception) -> UserError:
    """The one-line error for a checkpoint directory that cannot be read."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{folder} cannot be read ({first}): use another checkpoint")
