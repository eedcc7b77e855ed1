"""The file format of a checkpoint folder: complete or absent.

A checkpoint folder is written to a hidden sibling, every file fsynced, `manifest.json` (name, size, sha256 of each
file, and its own) last, then renamed. Nothing that is read can execute code: safetensors, JSON, and
`torch.load(weights_only=True)`.
"""

import hashlib
import json
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from engine.distributed.fsdp import full_tensor, is_dtensor, is_sharded, shard_like
from engine.distributed.process_group import is_main
from utils.atomic import atomic_directory, write_file
from utils.errors import UserError
from utils.log import warn

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """{name in the state dict: the name its storage is saved under}: tied weights share one entry."""
    first, names = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = tensor.numel() and not is_dtensor(tensor)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if plain else id(tensor)
        names[name] = first.setdefault(key, name)
    return names


def weights_bytes(model: torch.nn.Module) -> bytes:
    """The content of model.safetensors: fp32 (integers as they are), one copy of tied weights.

    Of a model that is shared out all processes ask for it, and only the main one gets it.
    """
    kept, tensors = set(canonical_names(model).values()), {}
    for name, tensor in model.state_dict().items():
        if name in kept:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor = full_tensor(tensor.detach())
            if is_main() or not is_sharded(model):
                tensors[name] = tensor.to("cpu", dtype).contiguous()
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copy model.safetensors into the model; UserError names the first tensor that is missing, unknown or misshapen."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from None
    source = matching(path, model, {name: tensor.shape for name, tensor in tensors.items()})
    for name, target in model.state_dict().items():
        target.copy_(shard_like(tensors[source[name]], target))


def restore_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint folder, in one file or in parts, into the model; UserError as `load_weights`."""
    if (folder / WEIGHTS).is_file():
        return load_weights(model, folder / WEIGHTS)
    from engine.runs.sharded_checkpoint import load_parts, stored  # slow to import, and few runs need it

    source = matching(folder, model, stored(folder, "model."))
    own = {f"model.{source[name]}": tensor.detach() for name, tensor in model.state_dict().items()}
    load_parts(folder, own, together=is_sharded(model))


def matching(path: Path, model: torch.nn.Module, shapes: dict) -> dict[str, str]:
    """{name in the state dict: the name in a file that holds these shapes}; UserError when they do not fit."""
    own, names = model.state_dict(), canonical_names(model)
    unknown = sorted(set(shapes) - set(own))
    if unknown:
        raise UserError(
            f"{path} holds {unknown[0]}, which this model has not: the architecture or its file has changed"
        )
    source = {name: name if name in shapes else names[name] for name in own}
    for name, target in own.items():
        shape = shapes.get(source[name])
        if shape is None:
            raise UserError(f"{path} lacks {name}: the architecture or its file has changed")
        if shape != target.shape:
            raise UserError(
                f"{path}: {name} is {tuple(shape)} there and {tuple(target.shape)} in this model: "
                "the architecture's fields must stay as they were"
            )
    return source


def save_checkpoint(folder: Path, model, optimizer, state: dict, about: dict, weights: bytes | None = None) -> None:
    """Write one checkpoint; OSError when it cannot be written, and then nothing is left behind.

    optimizer: None for the weights alone. state: plain numbers and tensors. about: goes into the manifest. weights: the
    content of model.safetensors where it has been gathered already. The main process alone calls it, but all of them
    for model and optimizer of a model that is shared out: each writes its part.
    """

    def write_rest(place, files, optimizer_state):
        if optimizer_state is not None:
            files.append(write_file(place / "optimizer.pt", lambda file: torch.save(optimizer_state, file)))
        files.append(write_file(place / "trainer_state.pt", lambda file: torch.save(state, file)))
        write_file(place / MANIFEST, lambda file: file.write(manifest_bytes({**about, "files": files})))

    if optimizer is not None and is_sharded(model):
        from engine.runs.sharded_checkpoint import save_parts, without_parts

        plain, parts = without_parts(optimizer.state_dict())
        own, kept = model.state_dict(), set(canonical_names(model).values())
        parts |= {f"model.{name}": tensor for name, tensor in own.items() if name in kept}
        return save_parts(folder, parts, lambda place, files: write_rest(place, files, plain))
    with atomic_directory(folder) as place:
        files = [write_file(place / WEIGHTS, lambda file: file.write(weights or weights_bytes(model)))]
        write_rest(place, files, None if optimizer is None else optimizer.state_dict())


def manifest_bytes(about: dict) -> bytes:
    """The content of a manifest: `about` and its sha256, so that a bit that flips in here is found as well."""
    about = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return json.dumps({**about, "sha256": digest}, indent=1).encode()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None when there is none that is as it was written."""
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        plain = isinstance(manifest, dict) and all(isinstance(entry, dict) for entry in manifest["files"])
        return manifest if plain and manifest_bytes(manifest) == content else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def damage(folder: Path, sizes_only: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None when every byte is as it was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return "it has no readable manifest.json"
    files = {Path(str(entry.get("name"))).name: entry for entry in manifest["files"]}
    if "trainer_state.pt" not in files or not weights_files(manifest):
        return "its manifest.json names no weights"
    try:
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry.get("size") or not (sizes_only or file_sha256(path) == entry.get("sha256")):
                return f"{name} is not as it was written"
    except OSError as error:  # a bad sector
        return f"{name} cannot be read ({error.strerror})"
    return None


def weights_files(manifest: dict) -> list[dict]:
    """The entries of a manifest that are weights: one file, or one a process."""
    return [entry for entry in manifest["files"] if str(entry.get("name")).startswith("model")]


def weights_sha256(folder: Path) -> str:
    """What tells the weights of a valid checkpoint from any others."""
    sums = [entry["sha256"] for entry in weights_files(read_manifest(folder))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def step_of(folder: Path) -> int:
    """The step of a step checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def find_checkpoints(run: Path) -> list[Path]:
    """Step checkpoints of a run, newest first, valid or not."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=step_of, reverse=True)


def newest_checkpoint(run: Path, final: bool = False) -> Path | None:
    """The newest valid checkpoint; damaged ones are named and skipped. `final`: prefer the run's final weights."""
    for folder in ([run / "final"] if final and (run / "final").exists() else []) + find_checkpoints(run):
        problem = damage(folder)
        if problem is None:
            return folder
        warn(f"skipping damaged checkpoint {folder}: {problem}")
    return None


def load_training_state(folder: Path, model, optimizer) -> dict:
    """Restore model and optimizer in place and return the trainer's state, from a checkpoint found valid."""
    if not (folder / "optimizer.pt").is_file():
        raise UserError(f"{folder} has no optimizer state to go on from: give a run folder that has checkpoints/")
    restore_weights(model, folder)
    # to the cpu first: load_state_dict then puts each tensor beside its parameter
    try:
        saved = read_plain(folder / "optimizer.pt")
        if is_sharded(model) or not (folder / WEIGHTS).is_file():
            from engine.runs.sharded_checkpoint import with_parts

            saved = with_parts(saved, optimizer, folder, together=is_sharded(model))
        optimizer.load_state_dict(saved)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if getattr(error, "user_error", False):
            raise
        raise UserError(
            f"{folder}/optimizer.pt does not fit this optimizer ({error}): --optimizer and the "
            "architecture must stay as they were"
        ) from None
    return read_plain(folder / "trainer_state.pt")


def read_plain(path: Path) -> dict:
    """A dict of plain values and tensors from torch.save; UserError for anything else, and nothing in it is run."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read ({first}): use another checkpoint") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no training state: use another checkpoint")
    return value
