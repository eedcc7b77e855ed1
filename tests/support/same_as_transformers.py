"""Equality of an architecture with transformers' own class: logits, loss, gradients, greedy text, files, names.

The test of a model gives the sizes, and nothing here knows a model:

    model = random_model(args, seed)
    write(model, tmp_path)
    assert_same_numbers(model, tmp_path, seed)
    assert_same_text(model, tmp_path)
    assert_same_files(model, tmp_path)
    assert_published_names(type(model), published_config)
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checks import ModelUnderTest
from engine.inference.generate import generate
from model import BaseModel, BaseModelArgs, get_model_and_args, list_models

PROMPT = [1, 5, 9, 2, 11, 30, 17]
SCALE = 2.0**20  # of gradients that go through a layout: what it adds to a weight is lost in rounding


def random_model(args: BaseModelArgs, seed: int = 0) -> BaseModel:
    """Return a model of `args` in which every parameter matters, and every buffer of its checkpoint that is zero."""
    name = next(name for name in list_models() if get_model_and_args(name)[1] is type(args))
    tested = ModelUnderTest(name)
    tested.args = args
    model = tested.build(seed)
    saved = model.state_dict()
    for buffer, tensor in model.named_buffers():
        if buffer in saved and tensor.is_floating_point() and not tensor.any():
            torch.nn.init.normal_(tensor, std=0.1)
    return model


def write(model: BaseModel, folder: Path) -> None:
    """Write config.json and model.safetensors as an export does, without the tokenizer."""
    config, tensors = model.to_hf()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return (config.json, {name: tensor}) of a folder."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def transformers_or_skip():
    """Return the package, silenced; skip the test where it is not installed."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def load(folder: Path):
    """Return transformers' model of a folder, in its plainest form: no fused attention, no grouped experts."""
    auto = transformers_or_skip().AutoModelForCausalLM
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return auto.from_pretrained(folder, dtype=torch.float32, **plain).eval()


def their_loss(reference, ids: Tensor, labels: Tensor) -> Tensor:
    return reference(ids, labels=labels, use_cache=False).loss


def assert_same_numbers(
    model: BaseModel,
    folder: Path,
    seed: int = 0,
    length: int = 31,
    logits: float = 1e-5,
    gradients: float = 1e-5,
    our_loss: Callable = lambda out: out[1],
    loss: Callable = their_loss,
    only_ours: str = "^$",
    untrained: str = "^$",
) -> None:
    """Compare logits (absolute), loss and the gradient of every parameter (relative, by its norm) on random tokens.

    our_loss: of what `forward` returns; loss(reference, ids, labels): theirs. only_ours: a pattern of published names
    that transformers does not load; untrained: of those that may have no gradient, such as experts without a token.
    """
    reference = load(folder)
    ids, labels, targets = random_batch(model.args.vocab_size, seed, length)
    with torch.no_grad():
        got, want = model(ids)[0], reference(ids, use_cache=False).logits
    error = (got - want).abs().max().item()
    assert error < logits, f"logits differ by {error:.2g}"
    assert want.std() > 0.3  # weights at which an error would show

    mine, theirs = our_loss(model(ids, targets=targets)), loss(reference, ids, labels)
    assert abs(mine.item() - theirs.item()) < 1e-5 * theirs.item()
    mine.backward()
    theirs.backward()
    assert_same_gradients(our_gradients(model), their_gradients(reference), gradients, only_ours, untrained)


def random_batch(vocab_size: int, seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, labels, targets), (2, length): a fifth of the labels are ignored, targets are shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (2, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return ids, labels, torch.cat((labels[:, 1:], labels.new_full((2, 1), -100)), dim=1)


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float, only_ours: str = "^$", untrained: str = "^$"
) -> None:
    """Compare {published name: gradient}, relative to its norm, or to 0.01 where that is smaller and sums cancel."""
    assert not theirs.keys() - ours.keys(), f"transformers has {sorted(theirs.keys() - ours.keys())} as well"
    left = [name for name, grad in ours.items() if name not in theirs and grad.any()]  # zero: that of a buffer
    assert not [name for name in left if not re.search(only_ours, name)], f"transformers does not have {left}"
    wrong = []
    for name, grad in theirs.items():
        error = ((ours[name] - grad).norm() / grad.norm().clamp(min=0.01)).item()
        if not error < tolerance:
            wrong.append(f"{name}: {error:.2g}")
        assert grad.any() or re.search(untrained, name), f"{name} has no gradient: give weights at which it matters"
    assert not wrong, f"relative errors of gradients: {', '.join(wrong)}"


def our_gradients(model: BaseModel) -> dict[str, Tensor]:
    """Return {published name: gradient}: the linear part of the layout, applied to gradients instead of weights."""
    image = copy.deepcopy(model)
    for param in image.parameters():
        param.data = torch.zeros_like(param)
    zeros = image.to_hf()[1]
    for mine, param in zip(model.parameters(), image.parameters(), strict=True):
        param.data = torch.zeros_like(mine) if mine.grad is None else mine.grad * SCALE
    return {name: (tensor - zeros[name]) / SCALE for name, tensor in image.to_hf()[1].items()}


def their_gradients(reference) -> dict[str, Tensor]:
    """Return {published name: gradient} of transformers' model, whose own names and stacks of experts may differ."""
    from transformers.core_model_loading import revert_weight_conversion

    found = {name: p for name, p in reference.named_parameters() if p.numel()}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in found.items()}
    return revert_weight_conversion(reference, gradients)


def assert_same_text(model: BaseModel, folder: Path, new: int = 256, reference=None, **settings) -> None:
    """Compare `new` greedy tokens: ours by the inference state, theirs by `generate` with its cache."""
    reference = load(folder) if reference is None else reference
    ours = generate(model, None, [PROMPT], new, stop_ids=(), temperature=0)[0]
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    theirs = reference.generate(torch.tensor([PROMPT]), max_new_tokens=new, **settings)[0, len(PROMPT) :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    assert same == new, f"the texts are the same for {same} of {new} tokens"
    assert len(set(ours)) > 5  # no stuck repetition that any model would reproduce


def assert_same_files(model: BaseModel, folder: Path) -> None:
    """Import and export give the same bytes, and what transformers saves is imported to the same bits."""
    write(type(model).from_hf(*read(folder)), folder / "again")
    for file in ("config.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (folder / "again" / file).read_bytes(), file
    load(folder).save_pretrained(folder / "theirs")
    imported = type(model).from_hf(*read(folder / "theirs"))
    assert imported.to_hf()[0] == model.to_hf()[0]  # config.json; an argument may have a short form for the same
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in imported.state_dict().items())


def assert_published_names(Model: type[BaseModel], config: dict) -> None:
    """Build the published config.json on the meta device, on both sides: names and shapes of all tensors are equal."""
    transformers = transformers_or_skip()
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        layout = Model.hf_layout.for_config(config)
        ours = Model(layout.model_args(config))
    saved = reference.state_dict()
    tensors = dict(reference.named_parameters())  # a tied one once
    tensors |= {name: buffer for name, buffer in reference.named_buffers() if name in saved}
    theirs = revert_weight_conversion(reference, tensors)
    got = {name: tuple(tensor.shape) for name, tensor in layout.tensors(ours).items()}
    assert got == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
