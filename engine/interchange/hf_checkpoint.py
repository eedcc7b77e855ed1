"""Reading a published checkpoint: its config, and its safetensors, in one or several files, one tensor at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model import get_model_and_args, list_models
from model.basemodel import BaseModel
from utils.errors import UserError
from utils.files import load_json


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError when the file is missing or holds none."""
    return load_json(path, "give the folder of a published checkpoint")


def architecture_for(config: dict[str, Any]) -> tuple[str, type[BaseModel]]:
    """Return (name, Model) for a config.json: the model that wrote it, else the first whose layout reads it."""
    models = {name: get_model_and_args(name)[0] for name in list_models()}
    published = {name: Model for name, Model in models.items() if Model.hf_layout is not None}
    fitting = {name: Model for name, Model in published.items() if Model.hf_layout.reads(config)}
    if not fitting:
        known = ", ".join(sorted(Model.hf_layout.architecture for Model in published.values()))
        raise UserError(
            f"no model here reads {(config.get('architectures') or ['an unnamed architecture'])[0]}: "
            f"known are {known} (docs/interchange.md shows how to add one)"
        )
    writer = (config.get("mini_llm") or {}).get("model_name")
    name = str(writer) if writer in fitting else min(fitting)
    return name, fitting[name]


class Weights(Mapping[str, torch.Tensor]):
    """{name: tensor} of a folder's safetensors; each tensor is read on access."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        self._file_of: dict[str, Any] = {}
        for name in files:
            path = folder / Path(name).name
            if not path.is_file():
                raise UserError(f"{folder} has no {path.name}: only complete checkpoints in safetensors are read")
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


class ExtendedWeights(Mapping[str, torch.Tensor]):
    """The same weights, with the tensors `names` extended to `vocab_size` rows; each new row is the mean of all."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: set[str], vocab_size: int):
        self._weights = weights
        self._names = names
        self._vocab_size = vocab_size

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        if name not in self._names:
            return tensor
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self._vocab_size - len(tensor), -1)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
