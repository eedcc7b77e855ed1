"""Every model with a layout, built by the published config.json of its family: names and shapes of the published files.

tests/support/published/ has those files, with the keys of the published ones. Nothing here names a model: a new layout
needs a file that it reads, and no more.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from checks import ModelUnderTest
from model import ModelError, get_model_and_args, list_models
from tests.support.paths import ROOT

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CONFIGS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("support/published/*.json")}
LAYOUTS = {
    name: layout
    for name in list_models()
    if (layout := getattr(get_model_and_args(name)[0], "hf_layout", None)) is not None
}
PAIRS = [
    pytest.param(name, file, marks=[pytest.mark.slow] if "num_experts" in json.dumps(config) else [])
    for name, layout in LAYOUTS.items()
    for file, config in sorted(CONFIGS.items())
    if layout.reads(config)
]


def published(config):
    """{name in the file: shape} of what transformers saves for a config.json; of a multimodal one for its text part."""
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.for_model(**config.get("text_config", config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    saved = model.state_dict()
    tensors = {name: saved[name] for name in dict(model.named_parameters())}  # a tied one once
    tensors |= {name: saved[name] for name, _ in model.named_buffers() if name in saved}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


@pytest.mark.parametrize("name,file", PAIRS)
def test_names_and_shapes(name, file):
    config = CONFIGS[file]
    theirs = published(config)
    Model = get_model_and_args(name)[0]
    layout = LAYOUTS[name].for_config(config)
    args = layout.model_args(config, theirs)
    with torch.device("meta"):
        model = Model(args)
    ours = {name: tuple(tensor.shape) for name, tensor in layout.tensors(model).items()}
    assert ours == theirs


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_arguments_survive_config_json(name):
    """The published arguments are written to a config.json that is read as the same, by us and by transformers."""
    found = [config for config in CONFIGS.values() if LAYOUTS[name].reads(config)]
    assert found, f"tests/support/published/ has no config.json that the layout of {name} reads: add that of its family"
    for config in found:
        layout = LAYOUTS[name].for_config(config)
        args = layout.model_args(config)
        written = json.loads(json.dumps(layout.config(args)))
        again = LAYOUTS[name].for_config(written)
        assert again is layout and again.model_args(written) == args
        transformers.AutoConfig.for_model(**written)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documentation_lists_it(name):
    listed = (ROOT / "docs/interchange.md").read_text()
    for architecture in LAYOUTS[name].architecture.split(", "):
        assert f"`{architecture}`" in listed, f"add {architecture} to the table of docs/interchange.md"


HOSTILE = (None, "x", "", [], [1], ["x"], {}, {"x": 1}, 0, -1, 3, 1.5, True, float("nan"), float("inf"))


def changed(config):
    """Yield (path, a copy of config with one value replaced) for every value, also of nested objects."""
    for key, value in config.items():
        for other in HOSTILE:
            yield f"{key}={other!r}", config | {key: other}
        if isinstance(value, dict):
            for path, inner in changed(value):
                yield f"{key}.{path}", config | {key: inner}


@pytest.mark.parametrize(
    "name,file", [(name, file) for name in LAYOUTS for file, config in CONFIGS.items() if LAYOUTS[name].reads(config)]
)
def test_a_wrong_value_is_one_line(name, file):
    """Any value in the place of any other: arguments, or one line that says what is wrong."""
    layout = LAYOUTS[name].for_config(CONFIGS[file])
    refused = 0
    for path, config in changed(CONFIGS[file]):
        try:
            layout.model_args(config)
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error), path
        except Exception as error:
            raise AssertionError(f"{path} is a {type(error).__name__}: {error}") from error
    assert refused > 100


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_small_model_survives_export_and_import(name):
    """The same config.json and bits, every parameter and buffer random; what is missing or misshapen is named."""
    tested = ModelUnderTest(name)
    model = tested.build(0)
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.any():
            model.get_buffer(key).normal_(generator=generator)
    config, tensors = model.to_hf()
    imported = type(model).from_hf(json.loads(json.dumps(config)), tensors)
    for key, tensor in model.state_dict().items():
        assert torch.equal(imported.state_dict()[key], tensor), key
    config_again, again = imported.to_hf()
    assert config_again == config and again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())

    layout = LAYOUTS[name].for_args(model.args)
    optional = layout.copies(model.args)
    for key in sorted(tensors)[::17]:
        with pytest.raises(ModelError, match=re.escape(key)):
            layout.load(imported, tensors | {key: torch.zeros(2, 3, 4, 5)})
        if key not in optional:
            with pytest.raises(ModelError, match=f"lacks {re.escape(key)}$"):
                layout.load(imported, {other: tensor for other, tensor in tensors.items() if other != key})
