"""Reading a published checkpoint: its config, and its safetensors, in one or several files, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import get_model_and_args, list_models
from model.basemodel import BaseModel
from utils.atomic import write_text
from utils.errors import UserError
from utils.files import load_json, require_content

INDEX = "model.safetensors.index.json"
MAX_FILE = 5 * 10**9  # bytes of tensors in one file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError when the file is missing or holds none."""
    return load_json(path, "give the folder of a complete checkpoint, or fetch the file again")


def architecture_for(config: dict[str, Any]) -> tuple[str, type[BaseModel]]:
    """Return (name, Model) for a config.json: the model that wrote it, else the first whose layout reads it."""
    models = {name: get_model_and_args(name)[0] for name in list_models()}
    published = {name: Model for name, Model in models.items() if Model.hf_layout is not None}
    fitting = {name: Model for name, Model in published.items() if Model.hf_layout.reads(config)}
    if not fitting:
        known = ", ".join(sorted(Model.hf_layout.architecture for Model in published.values()))
        names = config.get("architectures")
        wanted = names[0] if isinstance(names, list) and names else names
        raise UserError(
            f"no model here reads {wanted or config.get('model_type') or 'an unnamed architecture'}: "
            f"known are {known} (docs/interchange.md shows how to add one)"
        )
    writer = written_here(config).get("model_name")
    name = writer if isinstance(writer, str) and writer in fitting else min(fitting)
    return name, fitting[name]


def written_here(config: dict[str, Any]) -> dict[str, Any]:
    """Return what our export notes in a config.json ({"model_name", "stage"}); {} for a checkpoint of others."""
    note = config.get("mini_llm")
    return note if isinstance(note, dict) else {}


class Weights(Mapping[str, torch.Tensor]):
    """{name: tensor} of a folder's safetensors; each tensor is read on access."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Any] = {}
        for name in weight_files(folder):
            path = folder / Path(name).name
            if not path.is_file():
                raise UserError(f"{folder} has no {path.name}: only complete checkpoints in safetensors are read")
            require_content(path)
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors of a folder, by its index if it has one; UserError for a damaged index."""
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(
            f'{index} has no weight_map, which gives the file of each tensor ("weight_map": {{tensor: file}}): '
            "fetch it again, or remove it where model.safetensors is the only file"
        )
    return sorted(set(files.values()))


def save_weights(tensors: dict[str, torch.Tensor], folder: Path, max_bytes: int = MAX_FILE) -> None:
    """Write model.safetensors, or files of up to `max_bytes` of tensors (one at least) and the index of their names."""
    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for file, part in zip(names, files, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, part in zip(names, files, strict=True) for name in part}
        write_text(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
        )


class ExtendedWeights(Mapping[str, torch.Tensor]):
    """The same weights, with `new_rows` more rows in the tensors `names`, which have `vocab_size`: the mean of those.

    A table of integers, such as experts of a token, has no mean, and begins again with the rows of the first tokens.
    UserError for one that has another number of rows.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], names: set[str], vocab_size: int, new_rows: int) -> None:
        self._weights = weights
        self._names = names
        self._vocab_size = vocab_size
        self._new_rows = new_rows

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        if name not in self._names:
            return tensor
        if tensor.dim() != 2 or len(tensor) != self._vocab_size:
            raise UserError(
                f"{name} is {tuple(tensor.shape)}, and config.json has vocab_size={self._vocab_size}: correct that"
            )
        if not tensor.is_floating_point():
            return tensor[torch.arange(self._vocab_size + self._new_rows) % self._vocab_size]
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self._new_rows, -1)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
