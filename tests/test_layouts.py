"""Layouts of published checkpoints, on made-up tables: each operation in both directions, each mistake in one line."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from engine.interchange.hf_checkpoint import ExtendedWeights, Weights, save_weights
from model.basemodel import BaseModel, BaseModelArgs, ModelError
from model.hf import (
    Join,
    Key,
    Layout,
    MinusOne,
    Rows,
    Shape,
    Transposed,
    Variants,
    alternating_blocks,
    interleaved_rows,
)
from model.layers.rotary import RopeArgs

FIELDS = {"vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings"}


@dataclass
class Args(BaseModelArgs):
    vocab_size: int = 7
    max_seq_len: int = 8


class Sketch(BaseModel):
    """A model that is nothing but the tensors of `spec`, {dotted name: tensor}."""

    def __init__(self, args, spec):
        super().__init__(args)
        for name, tensor in spec.items():
            *outer, last = name.split(".")
            module = self
            for part in outer:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if not tensor.is_floating_point():
                module.register_buffer(last, tensor)
            else:
                setattr(module, last, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))


def layout_of(**table):
    return Layout(
        args=Args,
        architecture="SketchForCausalLM",
        model_type="sketch",
        **{"fields": FIELDS, "names": lambda args: {}, **table},
    )


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# {case: (table, {our name: tensor}, what is published of it: a function of those tensors)}
CASES = {
    "as it is": ({}, {"a.w": numbers(3, 2)}, lambda a: {"a.w": a}),
    "a scalar": ({}, {"scale": numbers()}, lambda a: {"scale": a}),
    "renamed": (
        {"names": lambda args: {"^a.": "b.c.", ".w$": ".weight"}},
        {"a.w": numbers(2)},
        lambda a: {"b.c.weight": a},
    ),
    "rows": (
        {"stored": lambda args: {".w": Rows(torch.tensor([2, 0, 1]))}},
        {"a.w": numbers(3, 2)},
        lambda a: {"a.w": torch.stack((a[2], a[0], a[1]))},
    ),
    "columns": (
        {"stored": lambda args: {".w": Rows(torch.tensor([1, 2, 0]), dim=1)}},
        {"a.w": numbers(2, 3)},
        lambda a: {"a.w": torch.stack((a[:, 1], a[:, 2], a[:, 0]), 1)},
    ),
    "a rotary vector": (
        {"stored": lambda args: {".w": Rows(interleaved_rows(1, 1, 4))}},
        {"norm.w": numbers(5)},
        lambda a: {"norm.w": a[[0, 1, 3, 2, 4]]},
    ),
    "transposed": (
        {"stored": lambda args: {".w": Transposed()}},
        {"a.w": numbers(2, 3, 4)},
        lambda a: {"a.w": a.transpose(1, 2)},
    ),
    "a convolution": (
        {"stored": lambda args: {"conv.w": Shape(-1, 1, 3)}},
        {"conv.w": numbers(5, 3)},
        lambda a: {"conv.w": a[:, None]},
    ),
    "four dimensions": (
        {"stored": lambda args: {"A_log": Shape(1, 1, -1, 1)}},
        {"a.A_log": numbers(5)},
        lambda a: {"a.A_log": a[None, None, :, None]},
    ),
    "two operations": (
        {"stored": lambda args: {".w": (Shape(2, 3, 4), Transposed(0, 1))}},
        {"a.w": numbers(6, 4)},
        lambda a: {"a.w": a.view(2, 3, 4).transpose(0, 1)},
    ),
    "one by one": (
        {"names": lambda args: {".w$": ".experts.*.weight"}, "stored": lambda args: {".w": Transposed()}},
        {"a.w": numbers(2, 3, 4)},
        lambda a: {"a.experts.0.weight": a[0].T, "a.experts.1.weight": a[1].T},
    ),
    "split": (
        {
            "names": lambda args: {".conv.w$": ".{q,k,v}_conv1d.weight"},
            "stored": lambda args: {".conv.w": Shape(-1, 1, 3)},
        },
        {"a.conv.w": numbers(6, 3)},
        lambda a: {f"a.{x}_conv1d.weight": a[2 * i : 2 * i + 2, None] for i, x in enumerate("qkv")},
    ),
    "joined": (
        {
            "names": lambda args: {".(v|q|k)_proj.": ".qkv."},  # in another order than ours
            "joined": lambda args: {".qkv.w": Join(("q_proj", "k_proj.w", "a.v_proj.w"))},
        },
        {"a.v_proj.w": numbers(1, 2), "a.k_proj.w": numbers(3, 2), "a.q_proj.w": numbers(4, 2), "b.w": numbers(2)},
        lambda v, k, q, b: {"a.qkv.w": torch.cat((q, k, v)), "b.w": b},
    ),
    "joined and interleaved": (
        {
            "names": lambda args: {".(gate|up)_proj$": ".gate_up"},
            "stored": lambda args: {".down": Transposed()},
            "joined": lambda args: {
                ".gate_up": Join(
                    ("gate_proj", "up_proj"), dim=1, then=(Rows(alternating_blocks(2, 3), dim=1), Transposed())
                )
            },
        },
        {"a.gate_proj": numbers(2, 3, 4), "a.up_proj": numbers(2, 3, 4) + 1, "a.down": numbers(2, 4, 3)},
        lambda gate, up, down: {
            "a.gate_up": torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2),
            "a.down": down.transpose(1, 2),
        },
    ),
    "joined per head": (
        {
            "names": lambda args: {".gate_proj": ".q_proj"},
            "joined": lambda args: {
                ".q_proj.w": Join(("q_proj", "gate_proj"), then=(Rows(alternating_blocks(2, 2, 3)),))
            },
            "stored": lambda args: {".q_proj.w": Rows(torch.arange(6).flip(0))},  # of ours, before they are joined
        },
        {"a.q_proj.w": numbers(6, 2), "a.gate_proj.w": numbers(6, 2) + 1},
        lambda q, gate: {
            "a.q_proj.w": torch.cat((q.flip(0).view(2, 3, 2), gate.view(2, 3, 2)), 1).flatten(0, 1)  # per head
        },
    ),
    "repeated": (
        {"copies": lambda args: {"mtp.w": "a.w"}},
        {"a.w": numbers(2, 3)},
        lambda a: {"a.w": a, "mtp.w": a},
    ),
    "integers": (
        {"names": lambda args: {"table": "tid2eid"}},
        {"a.table": torch.tensor([[2**53 + 1, -3], [2**62 + 1, 5]])},
        lambda a: {"a.tid2eid": a},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case):
    table, ours, published = CASES[case]
    layout = layout_of(**table)
    model = Sketch(Args(), {name: tensor.clone() for name, tensor in ours.items()})
    want = published(*ours.values())
    got = layout.tensors(model)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].is_contiguous()
        assert torch.equal(got[name], tensor), name
    other = Sketch(Args(), {name: torch.zeros_like(tensor) for name, tensor in ours.items()})
    layout.load(other, got)
    for name, tensor in ours.items():
        assert torch.equal(other.state_dict()[name], tensor), name
    shapes = layout.tensors(model.to("meta"))  # a published size need not fit into memory
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: t.shape for name, t in want.items()}


def test_a_norm_minus_one():
    """Exact where a trained norm lies; the other direction rounds, as its description warns."""
    weight = torch.rand(999, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.5
    layout = layout_of(stored=lambda args: {"norm.w": MinusOne()})
    model, other = Sketch(Args(), {"norm.w": weight.clone()}), Sketch(Args(), {"norm.w": torch.zeros(999)})
    tensors = layout.tensors(model)
    assert torch.equal(tensors["norm.w"], weight - 1)
    layout.load(other, tensors)
    assert torch.equal(other.norm.w, weight)


def test_a_tied_tensor_is_written_once():
    table = nn.Parameter(numbers(7, 2))
    layout = layout_of()
    tensors = layout.tensors(Sketch(Args(), {"tok_embed.weight": table, "lm_head.weight": table}))
    assert list(tensors) == ["tok_embed.weight"]
    new = nn.Parameter(torch.zeros(7, 2))
    model = Sketch(Args(), {"tok_embed.weight": new, "lm_head.weight": new})
    layout.load(model, tensors)
    layout.load(model, tensors | {"lm_head.weight": tensors["tok_embed.weight"]})
    assert torch.equal(model.lm_head.weight, table)
    with pytest.raises(ModelError, match="lm_head.weight differs from the weights that config.json ties it to"):
        layout.load(model, tensors | {"lm_head.weight": tensors["tok_embed.weight"] + 1})


EXPERTS = {"names": lambda args: {".w$": ".experts.*.weight"}}
QKV = {
    "names": lambda args: {".(q|k|v)_proj.": ".qkv."},
    "joined": lambda args: {".qkv.w": Join(("q_proj", "k_proj", "v_proj"))},
}


@pytest.mark.parametrize(
    "table,ours,change,message",
    [
        ({}, {"a.w": (3, 2)}, {"a.w": None}, "the checkpoint lacks a.w"),
        ({}, {"a.w": (3, 2)}, {"b.w": numbers(1)}, "b.w and 0 more tensors do not belong to this SketchForCausalLM"),
        ({}, {"a.w": (3, 2)}, {"a.w": numbers(2, 3)}, r"a.w is \(2, 3\), and config.json makes it \(3, 2\)"),
        (EXPERTS, {"a.w": (2, 3)}, {"a.experts.1.weight": None}, "the checkpoint lacks a.experts.1.weight"),
        (EXPERTS, {"a.w": (2, 3)}, {"a.experts.1.weight": numbers(4)}, r"a.experts.1.weight is \(4,\), .* it \(3,\)"),
        (EXPERTS, {"a.w": (2, 3)}, {"a.experts.2.weight": numbers(3)}, "a.experts.2.weight and 0 more"),
        (
            QKV,
            {"a.q_proj.w": (4, 2), "a.k_proj.w": (2, 2), "a.v_proj.w": (2, 2)},
            {"a.qkv.w": numbers(7, 2)},
            r"a.qkv.w is \(7, 2\), and config.json makes it \(8, 2\)",
        ),
        (
            {},
            {"a.w": (3,)},
            {"a.w": torch.arange(3)},
            "a.w is of int64, and this architecture has floating-point numbers",
        ),
        (
            {"copies": lambda args: {"b": "a"}},
            {"a": (3,)},
            {"b": numbers(3) + 1},
            "b differs from a, which it should repeat",
        ),
        (QKV, {"a.q_proj.w": (4, 2), "a.k_proj.w": (2, 2)}, {}, r"a.qkv.w joins q_proj, k_proj, v_proj, and the names"),
        ({"names": lambda args: {".w$": ".{a,b}"}}, {"x.w": (3, 2)}, {}, "3 rows of x.w are not 2 equal parts"),
        ({"names": lambda args: {"x|y": "z"}}, {"x": (3,), "y": (3,)}, {}, "y and another tensor both become z"),
    ],
)
def test_a_mistake_is_one_line(table, ours, change, message):
    layout = layout_of(**table)
    model = Sketch(Args(), {name: numbers(*shape) for name, shape in ours.items()})
    with pytest.raises(ModelError, match=message) as error:
        tensors = layout.tensors(model) | change
        layout.load(model, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(error.value)


def test_integers_are_not_read_from_fractions():
    layout = layout_of()
    model = Sketch(Args(), {"table": torch.arange(4)})
    layout.load(model, {"table": torch.tensor([3, 2, 1, 0], dtype=torch.int32)})
    assert model.table.tolist() == [3, 2, 1, 0] and model.table.dtype == torch.int64
    with pytest.raises(ModelError, match="table is of float32, and this architecture has integers there"):
        layout.load(model, {"table": torch.zeros(4)})


def test_other_names_and_tensors_that_are_left_out():
    layout = layout_of(aliases={"^language_model.": ""}, ignored=("^visual.", "inv_freq$"))
    model = Sketch(Args(), {"a.w": torch.zeros(2)})
    source = {"language_model.a.w": numbers(2), "visual.w": numbers(9), "a.inv_freq": numbers(3)}
    tensors = layout.checkpoint(source)
    assert sorted(tensors) == ["a.inv_freq", "a.w", "visual.w"] and len(tensors) == 3
    assert layout.left_out(tensors) == ["visual.w", "a.inv_freq"]
    assert layout.checkpoint(tensors) is tensors  # nothing to rename any more
    layout.load(model, tensors)
    assert torch.equal(model.a.w, numbers(2))
    with pytest.raises(ModelError, match="the checkpoint has .*a.w under two names: remove one"):
        layout.checkpoint(source | {"a.w": numbers(2)})


def test_new_tokens_get_rows_in_every_table_of_tokens():
    layout = layout_of(vocab_rows=("tok_embed.weight", "tid2eid"), copies=lambda args: {"again": "tok_embed.weight"})
    spec = {"tok_embed.weight": numbers(7, 2), "layers.0.tid2eid": torch.arange(14).view(7, 2), "a.w": numbers(7, 2)}
    model = Sketch(Args(), spec)
    names = layout.vocab_names(model)
    assert names == {"tok_embed.weight", "layers.0.tid2eid", "again"}
    more = ExtendedWeights(layout.tensors(model), names, 7, 9)
    assert torch.allclose(more["tok_embed.weight"][7:], spec["tok_embed.weight"].mean(0).expand(9, 2))
    assert torch.equal(
        more["layers.0.tid2eid"][7:], torch.cat((spec["layers.0.tid2eid"], torch.tensor([[0, 1], [2, 3]])))
    )
    assert torch.equal(more["a.w"], spec["a.w"])


def test_weights_in_several_files(tmp_path):
    tensors = {"a": numbers(9), "b": numbers(9) + 1, "big": numbers(99), "table": torch.arange(4)}
    save_weights(tensors, tmp_path, max_bytes=80)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (9 + 9 + 99) + 8 * 4
    read = Weights(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items()) and set(read) == set(tensors)
    (tmp_path / "one").mkdir()
    save_weights(tensors, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


# ---------------------------------------------------------------- config.json


@dataclass
class Mixed(RopeArgs, BaseModelArgs):
    """Arguments with everything that a config.json can hold in another way."""

    layer_types: tuple[str, ...] = ("conv", "full")
    head_dim: int = 16
    rotary_dim: int = 8
    rope_theta: float = 1e6
    local_theta: float = 1e4
    kinds: list[int] = ()
    balance: float = 0.25
    rope_truncate: bool = False  # what config.json lacks is not taken from here

    def __post_init__(self):
        self.check_rope()


PARTIAL = Key(
    "rope_parameters.full.partial_rotary_factor",
    "rope_parameters.local.partial_rotary_factor",
    write=lambda n, args: n / args.head_dim,
    read=lambda part, config: int(config["head_dim"] * part),
)
NESTED = Layout(
    args=Mixed,
    architecture="MixedForCausalLM",
    model_type="mixed",
    fields=FIELDS
    | {
        "layer_types": Key(
            "block_types",
            write=lambda kinds, args: [kind.upper() for kind in kinds],
            read=lambda kinds, config: [kind.lower() for kind in kinds],
        ),
        "kinds": "sizes.kinds",
        "head_dim": "head_dim",
        "rotary_dim": PARTIAL,
        "rope_theta": "rope_parameters.full.rope_theta",
        "local_theta": "rope_parameters.local.rope_theta",
    },
    names=lambda args: {},
    only_ours=("balance",),
    fixed={"rope_parameters.local.rope_type": "default", "hidden_act": "silu"},
    absent={"block_types": lambda config: ("conv",) * config["num_blocks"], "sizes.kinds": (1,)},
    rope="rope_parameters.full",
    more=lambda args: {"sizes.count": len(args.layer_types)},
    known_as=("MixedVision", "mixed_vision"),
    canonical=lambda config: {**config, **config.get("text_config", {})},
)
YARN = dict(rope_type="yarn", rope_factor=4.0, rope_original_max_seq_len=64, rope_beta_fast=16.0)


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_types": ("full",), "kinds": [3, 4], "rotary_dim": 4, "balance": 0.5},
        {**YARN, "rope_truncate": True},
        {**YARN, "rope_truncate": False, "rope_mscale": 0.7, "rope_mscale_all_dim": 0.9},
        {"rope_type": "llama3", "rope_factor": 2.0, "rope_original_max_seq_len": 64},
        {"rope_type": "linear", "rope_factor": 2.0},
    ],
)
def test_arguments_survive_config_json(changes):
    args = Mixed(**{"kinds": [1, 2], "rope_truncate": True, **changes})
    assert NESTED.model_args(as_json(NESTED.config(args))) == args


def test_where_the_keys_stand():
    config = NESTED.config(Mixed(kinds=[5], **YARN))
    full = config["rope_parameters"]["full"]
    assert full.pop("truncate") is False and full.pop("mscale") == full.pop("mscale_all_dim") == 0.0
    assert full == {
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e6,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_slow": 1.0,
        "beta_fast": 16.0,
    }
    local = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert config["rope_parameters"]["local"] == local
    assert config["block_types"] == ["CONV", "FULL"] and config["sizes"] == {"kinds": [5], "count": 2}
    assert config["balance"] == 0.25 and "rope_theta" not in config and "rope_scaling" not in config
    assert NESTED.fixed["rope_parameters.local.rope_type"] == "default"  # the table itself is not written to


def test_what_config_json_lacks():
    config = as_json(NESTED.config(Mixed(kinds=[5], rope_truncate=True, **YARN)))
    del config["block_types"], config["sizes"], config["balance"]
    config["num_blocks"] = 3
    args = NESTED.model_args(config)
    assert args.layer_types == ("conv",) * 3 and args.kinds == (1,) and args.balance == 0.25
    assert args.rope_truncate is True  # others assume that where the key is missing, whatever our default is
    del config["vocab_size"]
    with pytest.raises(ModelError, match="config.json has no vocab_size: it is not a complete MixedForCausalLM"):
        NESTED.model_args(config)
    assert NESTED.model_args({"text_config": {**config, "vocab_size": 9}}).vocab_size == 9


def test_an_attention_factor_of_one():
    """YaRN that leaves cos and sin alone, as two equal mscales do."""
    config = as_json(NESTED.config(Mixed(kinds=[5], **YARN)))
    full = config["rope_parameters"]["full"]
    del full["mscale"], full["mscale_all_dim"]
    full["attention_factor"] = 1.0
    args = NESTED.model_args(config)
    assert args.rope_mscale == args.rope_mscale_all_dim == 1.0
    full["attention_factor"] = 1.5
    with pytest.raises(ModelError, match="attention_factor=1.5, and its factor and mscale give 1.138"):
        NESTED.model_args(config)


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("rope_parameters", [1], r"rope_parameters=\[1\], and it must be an object"),
        ("rope_parameters.full", 3, "rope_parameters.full=3, and it must be an object"),
        ("rope_parameters.full.rope_theta", "1e4", "rope_theta='1e4', and it must be a finite number"),
        ("rope_parameters.local.rope_type", "yarn", "local.rope_type=yarn, and our MixedForCausalLM supports default"),
        ("rope_parameters.local.partial_rotary_factor", 0.25, "full.partial_rotary_factor=0.5 and .* make them agree"),
        ("head_dim", None, "config.json has no head_dim: it is not a complete MixedForCausalLM"),
        ("block_types", ["CONV", 1], r"block_types=\['CONV', 1\], which cannot be read"),
        ("sizes.kinds", 4, "sizes.kinds=4, and it must be a list"),
        ("sizes.kinds", [4, "5"], r"sizes.kinds\[1\]='5', and it must be an integer"),
        ("hidden_act", "gelu", "hidden_act=gelu, and our MixedForCausalLM supports silu only"),
        ("head_dim", True, "head_dim=True, and it must be an integer"),
        ("quantization_config", {"bits": 4}, "quantised"),
    ],
)
def test_a_wrong_value_is_one_line(path, value, message):
    config = as_json(NESTED.config(Mixed(kinds=[5])))
    *outer, last = path.split(".")
    inner = config
    for key in outer:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(ModelError, match=message) as error:
        NESTED.model_args(config)
    assert "\n" not in str(error.value)


def test_a_partial_rotation_needs_a_place():
    flat = replace(NESTED, fields=FIELDS, fixed={}, absent={}, rope="", canonical=lambda config: config)
    config = as_json(flat.config(Mixed()))
    assert config["rope_theta"] == 1e6 and config["rope_scaling"] is None
    assert flat.model_args(config).rope_theta == 1e6
    with pytest.raises(ModelError, match="partial_rotary_factor=0.5, and this architecture rotates entire heads"):
        flat.model_args({**config, "rope_parameters": {"partial_rotary_factor": 0.5}})


def test_the_base_that_an_architecture_assumes():
    layout = replace(NESTED, fields=FIELDS, fixed={}, absent={"rope_theta": 5e4}, rope="rope_parameters")
    config = as_json(layout.config(Mixed(rope_theta=2e4)))
    assert config["rope_parameters"] == {"rope_theta": 2e4, "rope_type": "default"}
    assert layout.model_args(config).rope_theta == 2e4
    assert layout.model_args({**config, "rope_parameters": {}}).rope_theta == 5e4
    older = {**config, "rope_parameters": None, "rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 2}}
    args = layout.model_args(older)
    assert (args.rope_theta, args.rope_type, args.rope_factor) == (3e4, "linear", 2.0)


def test_which_architecture_reads_a_config():
    assert NESTED.reads({"architectures": ["MixedForCausalLM"]}) and NESTED.reads({"model_type": "mixed"})
    assert NESTED.reads({"architectures": "MixedVision"}) and NESTED.reads({"model_type": "mixed_vision"})
    assert not NESTED.reads({"architectures": ["Other", None], "model_type": "other"}) and not NESTED.reads({})


def test_one_model_that_is_published_as_two_classes():
    dense = replace(layout_of(), holds=lambda args: args.max_seq_len < 100)
    sparse = replace(layout_of(), architecture="SparseForCausalLM", model_type="sparse")

    class Two(Sketch):
        hf_layout = Variants(dense, sparse)

        def __init__(self, args):
            super().__init__(args, {"w": numbers(2)})

    for length, name in ((8, "SketchForCausalLM"), (200, "SparseForCausalLM")):
        config, tensors = Two(Args(max_seq_len=length)).to_hf()
        assert config["architectures"] == [name]
        assert Two.hf_layout.reads(config) and Two.hf_layout.for_config(config).architecture == name
        assert Two.from_hf(config, tensors).args.max_seq_len == length
    assert Two.hf_layout.architecture == "SketchForCausalLM, SparseForCausalLM"
    only = Variants(dense)
    with pytest.raises(ModelError, match="no published class of SketchForCausalLM has these arguments"):
        only.for_args(Args(max_seq_len=200))
