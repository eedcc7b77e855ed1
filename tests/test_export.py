"""export.py: export to transformers and import, published checkpoints, and one line for each mistake."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import export
import pretrain
import sft
from engine.data.sequences import DocumentSequences
from engine.data.token_file import TokenFile
from engine.inference.chat import open_chat_model
from engine.runs.registry import load_run
from engine.training.evaluate import held_out_loss
from model import ModelError, get_model_and_args
from model.basemodel import BaseModel
from tests.support.models import BASE_MODEL, CHAT_MODEL, SHIPPED, TINY, sizes_of
from tests.support.token_files import stage_files
from utils.chat_template import encode_chat
from utils.errors import UserError
from utils.foreign_tokenizer import CHAT_TOKENS
from utils.tokenizer import StreamDecoder, load_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SMALL = {**TINY, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
PUBLISHED = [name for name in SHIPPED if get_model_and_args(name)[0].hf_layout is not None]
CHAT = [
    {"role": "system", "content": "短答"},
    {"role": "user", "content": " What is 月? "},
    {"role": "assistant", "content": "The moon."},
    {"role": "user", "content": "一句诗\n谢谢"},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    stage_files(folder)
    return folder


two_models = pytest.mark.parametrize("run", [BASE_MODEL, CHAT_MODEL], indirect=True)  # what no architecture changes


def some_slow(name):
    return pytest.param(name, marks=[] if name in (BASE_MODEL, CHAT_MODEL) else [pytest.mark.slow])


@pytest.fixture(scope="module", params=map(some_slow, PUBLISHED))
def run(request, work):
    """A run that was trained, and its export."""
    sizes = [f"--model.{key}={value}" for key, value in sizes_of(request.param, SMALL).items()]
    summary = pretrain.main(
        [
            f"--model_name={request.param}",
            f"--output_path={work}",
            f"--tokenizer_path={work / 'tokenizer'}",
            f"--pretrain_data_path={work / 'data/pretrain_train.bin'}",
            "--device=cpu",
            "--max_seq_len=64",
            "--max_steps=5",
            "--max_batch_size=4",
            "--eval_interval=0",
            "--sample_interval=0",
            *sizes,
        ]
    )
    folder = work / f"hf_{request.param}"
    export.main(["--run", summary["run"], "--to", "hf", str(folder)])
    return summary, folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_folder_is_complete(run):
    summary, folder = run
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    card = (folder / "README.md").read_text()
    assert f"{summary['val_loss']:.4f}" in card and f"{summary['params']['total']:,}" in card
    assert "auto_map" not in json.loads((folder / "config.json").read_text())  # no remote code


def test_export_import_export_is_byte_identical(run, tmp_path):
    _, folder = run
    export.main(["--from", "hf", str(folder), "--out", str(tmp_path / "run")])
    export.main(["--run", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "again")])
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert digest(folder / name) == digest(tmp_path / "again" / name), name


def test_transformers_gives_the_same_log_likelihoods(run, work):
    """The loss that the run itself reported for the held-out texts, from transformers, one text after another."""
    summary, folder = run
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    loaded = load_run(summary["run"])
    ours, tokenizer = loaded.model, loaded.tokenizer
    file = TokenFile(work / "data/pretrain_val.bin", tokenizer, "make")
    nats = targets = 0
    bounds = file.documents()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        ids = torch.from_numpy(file.read(slice(start, end)))[None]
        with torch.no_grad():
            logits, own = model(ids).logits.log_softmax(-1), ours(ids)[0].log_softmax(-1)
        chosen, own = (x[:, :-1].gather(2, ids[:, 1:, None])[..., 0] for x in (logits, own))
        assert (chosen - own).abs().max() < 1e-5
        nats, targets = nats - chosen.sum().item(), targets + chosen.numel()
    rows = DocumentSequences(file, 64, pack=True)
    again = held_out_loss(ours, ours, rows, tokenizer.characters, 4, 0, torch.device("cpu"), contextlib.nullcontext)
    assert nats / targets == pytest.approx(summary["val_loss"], abs=1e-6)
    assert again["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6) and again["val_targets"] == targets


@two_models
def test_both_render_a_chat_to_the_same_ids(run):
    _, folder = run
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_run(run[0]["run"]).tokenizer
    for prompt in (True, False):
        want = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert encode_chat(ours, CHAT, add_generation_prompt=prompt)[0] == want
    assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id == ours.bos_id
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [ours.eos_id, ours.im_end_id]


def test_an_imported_run_can_be_used(run, work, tmp_path):
    """It loads, answers, and is fine-tuned, like a run that was trained here."""
    _, folder = run
    export.main([f"--from_hf={folder}", f"--out={tmp_path / 'imported'}", "--max_seq_len=48"])
    imported = load_run(tmp_path / "imported")
    assert (imported.config["stage"], imported.model.args.max_seq_len) == ("pretrain", 48)
    generation = open_chat_model(tmp_path / "imported", "cpu").generate(
        [{"role": "user", "content": "abc"}], 5, temperature=0
    )
    list(generation)
    assert generation.tokens == 5 or generation.finish == "stop"
    summary = sft.main(
        [
            f"--init_from={tmp_path / 'imported'}",
            f"--output_path={tmp_path}",
            "--device=cpu",
            f"--sft_data_path={work / 'data/sft_train.bin'}",
            "--max_steps=2",
            "--max_batch_size=2",
            "--eval_interval=0",
            "--sample_interval=0",
        ]
    )
    assert summary["status"] == "finished"


# ---------------------------------------------------------------------------------------- published checkpoints


def foreign_tokenizer(folder, special):
    """A byte-level tokenizer with the special tokens of another project after its 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": special[0], "eos_token": {"content": special[1]}, "chat_template": "theirs"})
    )
    return backend


def checkpoint_of_others(folder, kind, vocab_size, special):
    """A random model that transformers saves itself, in several files."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, hidden_size=32, num_attention_heads=4, max_position_embeddings=256)
    rope = {"factor": 8.0, "original_max_position_embeddings": 32}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **sizes,
            intermediate_size=44,
            num_hidden_layers=2,
            num_key_value_heads=2,
            initializer_range=0.2,
            rope_parameters=rope
            | {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.DeepseekV3Config(
            **sizes,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_key_value_heads=4,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            kv_lora_rank=12,
            q_lora_rank=None,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            initializer_range=0.2,
            rope_parameters=rope
            | {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 32, "beta_slow": 1}
            | {"mscale": 1.0, "mscale_all_dim": 1.0},
        )
        model = transformers.DeepseekV3ForCausalLM(config)
        for layer in model.model.layers[1:]:
            torch.nn.init.normal_(layer.mlp.gate.e_score_correction_bias, std=0.1)
    model.save_pretrained(folder, max_shard_size="20KB")
    foreign_tokenizer(folder, special)
    return model.eval()


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(8)), "<|eot_id|>"]
FEW = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]


@pytest.mark.parametrize("kind,special", [("llama", LLAMA_3), ("llama", FEW), ("deepseek", FEW)])
def test_a_checkpoint_of_others(kind, special, tmp_path):
    theirs = checkpoint_of_others(tmp_path / "theirs", kind, 256 + len(special), special)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    export.main(["--from", "hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "run")])
    imported = load_run(tmp_path / "run")
    model, tokenizer = imported.model, imported.tokenizer
    assert imported.config["stage"] == "pretrain"

    text = "一句诗 and <|eot_id|> as text"
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257) and max(ids[1:]) < 256  # a mark in a text is text
    logits = model(torch.tensor([ids]))[0]
    want = theirs(torch.tensor([ids])).logits
    assert want.std() > 0.3 and (logits[..., : want.shape[-1]] - want).abs().max() < 1e-5

    new = [tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.think_id, tokenizer.end_think_id]
    if special == LLAMA_3:  # reserved slots are enough: nothing grows
        assert model.args.vocab_size == 256 + len(special) and set(new) < set(range(258, 266))
    else:
        assert model.args.vocab_size == tokenizer.vocab_size == max(new) + 1 > 256 + len(special)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text
    exported = tmp_path / "again"
    export.main(["--run", str(tmp_path / "run"), "--to", "hf", str(exported)])
    again = transformers.AutoTokenizer.from_pretrained(exported)
    assert again.apply_chat_template(CHAT, return_dict=False) == encode_chat(tokenizer, CHAT)[0]
    assert again.convert_tokens_to_ids(list(CHAT_TOKENS)) == new
    assert (again.bos_token_id, again.eos_token_id) == (256, 257)
    assert again(text, split_special_tokens=True).input_ids == ids


# ------------------------------------------------------------------------------------------------------------ mistakes


def changed(folder, target, config=None, tensors=None):
    """A copy of an exported folder with another config or other tensors."""
    shutil.copytree(folder, target)
    if config is not None:
        old = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(
            json.dumps({key: value for key, value in {**old, **config}.items() if value != "gone"})
        )
    if tensors is not None:
        save_file(tensors(load_file(target / "model.safetensors")), target / "model.safetensors")
    return target


def error_of(*argv) -> str:
    with pytest.raises(ValueError) as error:
        export.main(list(map(str, argv)))
    assert isinstance(error.value, (UserError, ModelError)) and "\n" not in str(error.value)
    return str(error.value)


@two_models
def test_what_cannot_be_imported_is_one_line(run, tmp_path):
    _, folder = run

    def trial(config=None, tensors=None):
        copy = changed(folder, tmp_path / str(len(list(tmp_path.iterdir()))), config, tensors)
        message = error_of("--from", "hf", copy, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()
        return message

    norm = next(name for name, tensor in load_file(folder / "model.safetensors").items() if tensor.ndim == 1)
    assert f"lacks {norm}" in trial(tensors=lambda t: {k: v for k, v in t.items() if k != norm})
    assert "strange" in trial(tensors=lambda t: {**t, "strange": torch.ones(2)})
    assert norm in trial(tensors=lambda t: {**t, norm: torch.ones(7)})
    untied = {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"] + 1}
    assert "lm_head.weight differs" in trial(tensors=lambda t: t | untied)
    assert "quantised" in trial({"quantization_config": {"quant_method": "fp8"}})
    assert "attention_bias=True" in trial({"attention_bias": True})
    assert "longrope" in trial({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}})
    assert "no hidden_size" in trial({"hidden_size": "gone"})
    assert "no model here reads GPT2LMHeadModel" in trial({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    assert "multiple of" in trial({"num_attention_heads": 3, "num_key_value_heads": 2, "n_group": 3})
    (tmp_path / "no_tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "no_tokenizer")
    assert "no tokenizer.json" in error_of("--from", "hf", tmp_path / "no_tokenizer", "--out", tmp_path / "out")


POINTER = "version https://git-lfs.example/spec/v1\noid sha256:0123\nsize 1234567\n"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("tokenizer.json", POINTER, "git-lfs pointer"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("generation_config.json", "[]", "no JSON object"),
        ("config.json", POINTER, "git-lfs pointer"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "null", "no JSON object"),
        ("config.json", '{"architectures": 7}', "no model here reads 7"),
        ("config.json", '{"architectures": []}', "an unnamed architecture"),
        ("config.json", '{"architectures": "LlamaForCausalLM", "mini_llm": 3}', "has no vocab_size"),
        ("model.safetensors", POINTER, "git-lfs pointer"),
        ("model.safetensors", "", "cannot be read"),
        ("model.safetensors", "x" * 100, "cannot be read"),
        (INDEX, "{}", "has no weight_map"),
        (INDEX, '{"weight_map": []}', "has no weight_map"),
        (INDEX, '{"weight_map": {}}', "has no weight_map"),
        (INDEX, '{"weight_map": {"a": 1}}', "has no weight_map"),
        (INDEX, '{"weight_map": {"a": "b.safetensors"}}', "has no b.safetensors"),
        (INDEX, POINTER, "git-lfs pointer"),
    ],
)
@two_models
def test_a_damaged_file_is_one_line_and_leaves_nothing_behind(run, name, content, message, tmp_path):
    _, folder = run
    copy = changed(folder, tmp_path / "copy")
    (copy / name).write_text(content)
    found = error_of("--from", "hf", copy, "--out", tmp_path / "new" / "out")
    assert message in found and [path.name for path in tmp_path.iterdir()] == ["copy"]


@two_models
def test_a_head_of_another_size_than_config_json_says_is_one_line(run, tmp_path):
    _, folder = run
    copy = changed(folder, tmp_path / "copy", {"vocab_size": 20})
    assert "config.json has vocab_size=20" in error_of("--from", "hf", copy, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- AutoTokenizer


@two_models
def test_auto_tokenizer_begins_a_text_as_our_commands_do(run, tmp_path):
    summary, folder = run
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_run(summary["run"]).tokenizer
    with open_chat_model(summary["run"], "cpu") as model:
        for text in ("abc", " x 月", "\n"):
            assert theirs(text).input_ids == model.text_ids(text) == [ours.bos_id, *ours.encode(text)]
    assert theirs(["a", "b"]).input_ids == [ours.encode_prompt("a"), ours.encode_prompt("b")]
    rendered = theirs.apply_chat_template(CHAT, return_dict=False)
    assert rendered.count(ours.bos_id) == 1

    export.main(["--from", "hf", str(folder), "--out", str(tmp_path / "run")])
    assert digest(tmp_path / "run/tokenizer/tokenizer.json") == digest(Path(summary["run"], "tokenizer/tokenizer.json"))
    assert load_tokenizer(folder).prefix_ids == [ours.bos_id]  # the export itself can be trained with


@two_models
def test_the_exported_chat_template_takes_content_parts(run):
    theirs = transformers.AutoTokenizer.from_pretrained(run[1])

    def ids(*contents):
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        return theirs.apply_chat_template(chat, return_dict=False)

    def part(text):
        return {"type": "text", "text": text}

    assert ids([part("a "), part("月")], "b") == ids("a 月", "b")
    assert ids([part(" a")], [part("b ")], "c") == ids(" a", "b", "c")
    assert ids("a", None) == ids("a", "") == ids("a", [])
    with pytest.raises(Exception, match="a part of a content is text, not image"):
        ids([part("a"), {"type": "image", "image": "x.png"}])


@two_models
def test_exports_and_imports_made_earlier_are_read_as_before(run, tmp_path):
    """Folders without a post-processor, with the template of then, and with tokens that import renamed."""
    summary, folder = run
    earlier = changed(folder, tmp_path / "earlier")
    shutil.copy(Path(summary["run"], "tokenizer/tokenizer.json"), earlier)  # no post-processor
    (earlier / "chat_template.jinja").write_text("{{- bos_token }}")
    export.main(["--from", "hf", str(earlier), "--out", str(tmp_path / "run")])
    ours = load_run(summary["run"]).tokenizer
    again = load_run(tmp_path / "run").tokenizer
    assert again.fingerprint == ours.fingerprint
    assert (again.prefix_ids, again.end_ids, again.stop_ids) == (ours.prefix_ids, ours.end_ids, ours.stop_ids)
    assert again.end_ids == {ours.eos_id, ours.im_end_id}

    names = ["<s>", "</s>", "<pad>", "<unk>", *CHAT_TOKENS]  # what import made of <|begin_of_text|>, ...
    (tmp_path / "renamed").mkdir()
    foreign_tokenizer(tmp_path / "renamed", names)
    (tmp_path / "renamed/tokenizer_config.json").unlink()
    renamed = load_tokenizer(tmp_path / "renamed")
    assert (renamed.bos_id, renamed.eos_id, renamed.pad_id, renamed.im_end_id) == (256, 257, 258, 261)
    assert renamed.prefix_ids == [256] and renamed.end_ids == renamed.stop_ids == {257, 261} and renamed.is_ours


@two_models
def test_invalid_commands_are_one_line(run, tmp_path):
    summary, folder = run
    assert "exists" in error_of("--run", summary["run"], "--to", "hf", folder)
    assert "which run" in error_of("--to", "hf", tmp_path / "x")
    assert "where to" in error_of("--from", "hf", folder)
    assert "--to hf DIR" in error_of("--run", summary["run"])
    assert "takes a format" in error_of("--run", summary["run"], "--to", "gguf", "x")
    assert "takes a format" in error_of("--run", summary["run"], "--to", "hf")
    assert "no run folder" in error_of("--run", tmp_path, "--to", "hf", tmp_path / "x")
    assert "config.json" in error_of("--from", "hf", tmp_path, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_layout_is_one_line():
    class Unpublished(BaseModel):
        model_name = "unpublished"

    for call in (lambda: Unpublished(None).to_hf(), lambda: Unpublished.from_hf({}, {})):
        with pytest.raises(ValueError, match="unpublished has no published layout.*docs/interchange.md") as error:
            call()
        assert isinstance(error.value, (UserError, ModelError)) and "\n" not in str(error.value)


def test_two_names_for_one_tensor_are_found():
    """A table that lets two tensors fall together would lose one of them."""
    Model, ModelArgs = get_model_and_args(PUBLISHED[0])
    model = Model(ModelArgs(vocab_size=40, max_seq_len=8, **sizes_of(PUBLISHED[0], SMALL)))

    class Wrong(Model):
        model_name = None
        hf_layout = dataclasses.replace(Model.hf_layout, names=lambda args: {"attn_norm|ffn_norm": "n"})

    model.__class__ = Wrong
    with pytest.raises(ValueError, match="both become layers.0.n.weight"):
        model.to_hf()
