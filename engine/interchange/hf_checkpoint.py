"""Reading a published checkpoint: its config, and its safetensors, one file or many, one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import get_model_and_args, list_models
from utils.errors import UserError
from utils.files import load_json


def read_json(path: Path) -> dict:
    """A JSON object; UserError when the file is missing or holds none."""
    return load_json(path, "give the folder of a published checkpoint")


def architecture_for(config: dict):
    """(name, Model) of ours that reads a config.json: the one that wrote it, else the first whose layout fits."""
    layouts = {name: get_model_and_args(name)[0] for name in list_models()}
    layouts = {name: Model for name, Model in layouts.items() if Model.hf_layout is not None}
    fitting = {name: Model for name, Model in layouts.items() if Model.hf_layout.reads(config)}
    if not fitting:
        known = ", ".join(sorted(Model.hf_layout.architecture for Model in layouts.values()))
        raise UserError(
            f"no model here reads {(config.get('architectures') or ['an unnamed architecture'])[0]}: "
            f"known are {known} (docs/interchange.md shows how to add one)"
        )
    wrote = (config.get("mini_llm") or {}).get("model_name")
    name = wrote if wrote in fitting else min(fitting)
    return name, fitting[name]


class Weights(Mapping):
    """{name: tensor} of a folder's safetensors; a tensor is read when it is asked for."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self._file_of = {}
        for name in files:
            path = folder / Path(name).name
            if not path.is_file():
                raise UserError(f"{folder} has no {path.name}: only checkpoints in safetensors are read, and whole")
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self):
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class Grown(Mapping):
    """The same weights with more rows in the tensors `names`, for new ids: each starts as the mean of all rows."""

    def __init__(self, weights: Mapping, names: set[str], rows: int):
        self._weights, self._names, self._rows = weights, names, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        if name not in self._names:
            return tensor
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self._rows - len(tensor), -1)))

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
