"""Checkpoints written and read in parts, by all processes: torch.distributed.checkpoint, as safetensors.

Of N processes the n-th writes <kind>-0000n-of-0000N.safetensors for each kind of tensor, which begins the names in it:
`model.norm.weight` is of the kind model. Which part of a tensor a file holds stands in its header, as JSON: nothing
that is read can execute code.
"""

import json
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.distributed.fsdp import is_dtensor, shard_like
from utils.atomic import atomic_directory, hidden, write_file
from utils.errors import UserError


class Writer(HuggingFaceStorageWriter):
    """Writes the parts of this process; the main one makes the folder before and gives it its name afterwards.

    rest(place, files): on the main process, writes what else belongs into the folder; files: what all have written.
    """

    def __init__(self, folder: Path, rest):
        self.place = hidden(folder, "tmp")
        super().__init__(str(self.place), save_distributed=True)
        self.folder, self.rest, self.open = folder, rest, ExitStack()

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        if is_coordinator:
            self.open.enter_context(atomic_directory(self.folder))

    def prepare_local_plan(self, plan):
        return plan  # the parent would make the folder here, on every process

    def write_data(self, plan, planner):
        kinds, written = {}, []
        for item in plan.items:
            kinds.setdefault(item.index.fqn.partition(".")[0], []).append(item)
        for kind, items in kinds.items():
            tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu().contiguous() for item in items}
            offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)} for item in items}
            content = save(tensors, metadata={"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})
            name = f"{kind}-{dist.get_rank() + 1:05d}-of-{dist.get_world_size():05d}.safetensors"
            entry = write_file(self.place / name, lambda file, content=content: file.write(content))
            written += [WriteResult(item.index, entry["size"], entry) for item in items]
        future = Future()
        future.set_result(written)
        return future

    def finish(self, metadata, results):
        files = {result.storage_data["name"]: result.storage_data for part in results for result in part}
        self.rest(self.place, [files[name] for name in sorted(files)])
        self.open.close()


def save_parts(folder: Path, tensors: dict[str, torch.Tensor], rest) -> None:
    """Write the folder; every process calls it, and an error of one, e.g. OSError, is raised on all of them."""
    writer = Writer(folder, rest)
    try:
        with writer.open:
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        raise first_failure(error) from None


def stored(folder: Path, kind: str) -> dict[str, torch.Size]:
    """{name without its beginning `kind`: shape} of the tensors of a folder; UserError when they cannot be read."""
    try:
        sizes = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(folder, error) from None
    return {name.removeprefix(kind): about.size for name, about in sizes.items() if name.startswith(kind)}


def load_parts(folder: Path, tensors: dict[str, torch.Tensor], together: bool) -> None:
    """Fill the tensors, whole ones or parts, from the parts of a folder, however many processes have written it.

    together: all processes call it at once. UserError when a tensor is not there or cannot be read.
    """
    missing = next((name for name in tensors if name not in stored(folder, "")), None)
    if missing:
        raise UserError(f"{folder} lacks {missing}: use another checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads in a single process
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)
    except CheckpointException as error:
        raise unreadable(folder, first_failure(error)) from None


def without_parts(state: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Take the tensors that are shared out from an optimizer's state: (the state, with their names there; they)."""
    parts = {}

    def named(value, *path):
        if not is_dtensor(value):
            return value
        name = ".".join(map(str, ("optimizer", *path)))
        parts[name] = value
        return name

    optimizers = [
        {
            **part,
            "state": {
                index: {key: named(value, number, index, key) for key, value in values.items()}
                for index, values in part["state"].items()
            },
        }
        for number, part in enumerate(state["optimizers"])
    ]
    return {"optimizers": optimizers}, parts


def with_parts(state: dict, optimizer, folder: Path, together: bool) -> dict:
    """Give an optimizer's state from a file what it needs here: parts for parts, and for a name its tensor."""
    wanted = {}

    def tensor(value, parameter):
        if isinstance(value, str):
            return wanted.setdefault(value, torch.zeros_like(parameter))
        return shard_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value

    optimizers = []
    for part, saved in zip(optimizer.all, state["optimizers"], strict=True):
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        optimizers.append(
            {
                **saved,
                "state": {
                    index: {key: tensor(value, parameters[index]) for key, value in values.items()}
                    for index, values in saved["state"].items()
                },
            }
        )
    if wanted:
        load_parts(folder, wanted, together)
    return {"optimizers": optimizers}


def first_failure(error: CheckpointException) -> Exception:
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, Exception) else RuntimeError(repr(failure))


def unreadable(folder: Path, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{folder} cannot be read ({first}): use another checkpoint")
