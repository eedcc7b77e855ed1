"""A sharded model trains as an unsharded one does, and its checkpoints are as safe."""

import copy
import itertools
import math
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from checks.harness.tiny_args import tiny_args
from engine.distributed import fsdp
from engine.runs import checkpoint_manager
from engine.runs.checkpoint import (
    MANIFEST,
    file_sha256,
    find_checkpoints,
    load_training_state,
    manifest_bytes,
    newest_checkpoint,
    read_manifest,
    restore_weights,
    step_of,
    verify_checkpoint,
    weights_bytes,
)
from engine.runs.registry import load_run
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from engine.training.step import TrainStep
from model import get_model_and_args
from tests.support.checkpoints import CONFIG, save, save_with_a_fault, two_checkpoints
from tests.support.checkpoints import trained as trained_full
from tests.support.faulty_disk import FaultyOS
from tests.support.models import SHIPPED
from tests.support.pickles import raw_pickle, torch_file
from tests.support.tiny_model import TinyModel, TinyModelArgs
from tests.support.torchrun import figures, sft_folder, train
from utils.errors import UserError

FLIPS = int(os.environ.get("FLIPS", "60"))
FSDP = {"parallel": "fsdp"}


def close(ours, theirs, rel=1e-5):
    """Whether two runs have the same records, values to `rel`."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs):
        for key in ("loss", "grad_norm", "val_loss", "val_bpc", "tokens", "val_targets"):
            assert (key in a) == (key in b) and (key not in a or a[key] == pytest.approx(b[key], rel=rel)), (a, b, key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sft_folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def sharded(folder):
    """Two processes, fsdp, saving at step 4 and at the end; (metrics, weights, output, run folder)."""
    return *train(folder, 2, "shared", save_interval=4, ema=0.9, sample_interval=4, **FSDP), folder / "shared/sft_tiny"


def test_a_sharded_run_equals_that_of_one_process(folder, sharded):
    """The curve, the average of the weights, and the samples; one parameter is touched by one of the processes only."""
    records, weights, output, run = sharded
    one, theirs, _ = train(folder, 1, "alone", save_interval=4, ema=0.9, sample_interval=4)
    assert "2 process(es), fsdp" in output
    close(records, one)
    for name, value in theirs.items():
        assert (value - weights[name]).abs().max() < 1e-4, name
    assert torch.equal(weights["bias"], theirs["bias"])
    assert (run / "samples.md").read_text() == (folder / "alone/sft_tiny/samples.md").read_text()


def test_one_process_loads_the_shards(sharded):
    """Weights and optimizer state of step 8 are those that, averaged, became final/."""
    _, final, _, run = sharded
    newest, before = find_checkpoints(run)
    assert {path.name for path in newest.iterdir()} == {
        "manifest.json",
        "optimizer.pt",
        "trainer_state.pt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    }
    sizes = [(newest / f"optimizer-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2)]
    assert max(sizes) < 1.1 * min(sizes)  # each its shards
    model = tiny(272, 32)
    optimizer = build_optimizer(model, TrainConfig(ema=0.9))
    state = load_training_state(newest, model, optimizer)
    assert state["step"] == 8
    with optimizer.averaged():
        assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items() if name != "unused")
    for path in (newest / "model-00002-of-00002.safetensors", newest / "optimizer.pt"):
        content = path.read_bytes()
        path.unlink()
        assert verify_checkpoint(newest) == f"{path.name} is missing" and newest_checkpoint(run) == before
        path.write_bytes(content)
    assert verify_checkpoint(newest) is None


@pytest.mark.slow
def test_processes_and_kind_may_change_on_resume(folder):
    """1 -> 2 (fsdp) -> 2 (ddp) -> 2 (fsdp) -> 1 processes, stopped in between: the curve of one, dropout included."""
    settings = {"model.dropout": 0.1, "max_steps": 9, "eval_interval": 0, "ema": 0.9}
    for processes, stop, parallel in (
        (1, "2", "ddp"),
        (2, "4", "fsdp"),
        (2, "5", "ddp"),
        (2, "7", "fsdp"),
        (1, "", "fsdp"),
    ):
        changed, weights, _ = train(folder, processes, "changing", {"STOP_AT": stop}, parallel=parallel, **settings)
    steady, theirs, _ = train(folder, 1, "unchanging", **settings)
    close(changed, steady)
    assert all((value - theirs[name]).abs().max() < 1e-4 for name, value in weights.items())


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_is_the_same_to_the_bit(folder, sharded):
    records, weights, output = train(
        folder, 2, "shared_killed", {"KILL_AT": "6"}, restarts=1, save_interval=4, ema=0.9, sample_interval=4, **FSDP
    )
    assert "from step 4" in output
    assert figures(records) == figures(sharded[0])
    assert all(torch.equal(value, sharded[1][name]) for name, value in weights.items())


@pytest.mark.slow
def test_a_dry_run_counts_what_one_process_holds(folder):
    full = train(folder, 2, "dry", dry_run=True)[2]
    records, weights, output = train(folder, 2, "dry", dry_run=True, **FSDP)
    assert "weights 36.2 KB + gradients 36.1 KB" in full and "weights 18.1 KB + gradients 18.1 KB" in output
    assert full.split("activations ")[1].split(" =")[0] == output.split("activations ")[1].split(" =")[0]
    assert records == [] and weights is None and not (folder / "dry").exists()


@pytest.mark.slow
def test_a_full_disk_under_one_process_is_a_failed_save_of_all_and_the_run_goes_on(folder, sharded):
    _, weights, output = train(folder, 2, "full", {"FAIL_AT": "4"}, save_interval=4, ema=0.9, sample_interval=4, **FSDP)
    assert output.count("step 4: the checkpoint could not be saved ([Errno 28] No space left on device)") == 1
    assert [step_of(path) for path in find_checkpoints(folder / "full/sft_tiny")] == [8, 5]
    assert not list((folder / "full/sft_tiny/checkpoints").glob(".*"))
    assert all(torch.equal(value, sharded[1][name]) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_however_a_step_is_divided(folder, name):
    """8 sequences per step: 1 x 8, 2 x 4, 8 x 1 on one process, 1 x 4 on each of two, 4 x 1 on each of two with fsdp.

    Not to the bit: the sums over the tokens of a step are taken in another order. And where a gradient, or one of its
    singular values, is nothing but rounding error, AdamW and Muon go as far by it as by any other: so the rate is
    small, losses and gradient norms are compared sharply, weights a tensor at a time and less so.
    """

    def run(processes, sequences, **more):
        return train(
            folder,
            processes,
            f"{name}_{processes}_{sequences}_{more}",
            model_name=name,
            max_batch_size=sequences,
            max_steps=4,
            max_lr=0.0003,
            **more,
        )[:2]

    full, weights = run(1, 8)
    for records, theirs in (run(1, 4), run(1, 1), run(2, 4), run(2, 1, **FSDP)):
        close(records, full, rel=1e-4)
        for key, value in weights.items():
            if key.endswith("routing_bias"):
                assert value.abs().max() > 0 and torch.equal(value, theirs[key]), key
            elif not value.is_floating_point():
                assert torch.equal(value, theirs[key]), key
            else:  # the weights of a zero-centred norm begin at 0
                least = 0.01 * value.numel() ** 0.5
                assert (value - theirs[key]).norm() <= 2e-2 * max(value.norm(), least), key
    (shards,) = (folder / f"{name}_2_1_{FSDP}").glob("*/checkpoints/*")
    model = load_run(shards).model  # as inference, fine-tuning and export read it
    assert len(list(shards.glob("model-*"))) == 2
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items() if key in theirs)


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_samples_compile_nothing(folder):
    settings = dict(model_name="mini_llama3", max_batch_size=2, max_steps=4, max_lr=0.0003, sample_interval=2, **FSDP)
    plain, weights, _ = train(folder, 2, "layers_plain", **settings)
    compiled, theirs, output = train(folder, 2, "layers_compiled", compile="true", **settings)
    assert "fp32 compiled, 2 process(es), fsdp" in output and "recompile_limit" not in output
    close(compiled, plain, rel=2e-5)
    assert all((value - theirs[key]).norm() <= 1e-2 * value.norm() for key, value in weights.items())


# ------------------------------------------------------------------- a group of one process: all of it within the test


def tiny(vocab_size=32, max_seq_len=8):
    return TinyModel(TinyModelArgs(vocab_size=vocab_size, max_seq_len=max_seq_len))


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(seed=0):
    """A tiny sharded model and its optimizer, after a step."""
    return trained_full(seed, lambda model: fsdp.shard(model, torch.device("cpu"), "fp32", compiled=False))


@pytest.fixture(scope="module")
def example(group, tmp_path_factory):
    return two_checkpoints(tmp_path_factory.mktemp("sharded") / "run", *trained())


def test_a_sharded_checkpoint_round_trip(example):
    run, model, optimizer = example
    for other, theirs in (trained(1), (fresh := tiny(), build_optimizer(fresh, CONFIG))):
        assert load_training_state(find_checkpoints(run)[0], other, theirs)["step"] == 2
        assert weights_bytes(other) == weights_bytes(model)
        for ours, part in zip(optimizer.all, theirs.all):
            for state, same in zip(ours.state.values(), part.state.values(), strict=True):
                assert all(torch.equal(fsdp.full_tensor(state[key]), fsdp.full_tensor(same[key])) for key in state)


@pytest.mark.parametrize("recipe", [{"optimizer": "adamw"}, {"optimizer": "muon", "ema": 0.9}])
def test_a_skipped_step_leaves_every_bit_of_the_shards(group, recipe):
    """Skipped for non-finite gradients; the steps after it are those of the run without it."""

    def run(*steps):
        torch.manual_seed(0)
        fsdp.shard(model := tiny(), torch.device("cpu"), "fp32", compiled=False)
        trainer = TrainStep(model, TrainConfig(**recipe, compile="false"), torch.device("cpu"))
        trainer.optimizer.set_lr(0.01)
        for number, weight in steps:
            ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(number))
            trainer.gradients([{"input_ids": ids, "targets": ids}], [weight], [0], 1.0)
            trainer.update(trainer.clip().isfinite())
        states = [
            state[key] for part in trainer.optimizer.all for state in part.state.values() for key in sorted(state)
        ]
        assert sum(map(fsdp.is_dtensor, states)) >= len(list(model.parameters())) - 1  # all but the unused one
        return [fsdp.full_tensor(t.detach()).numpy().tobytes() for t in [*model.parameters(), *states]]

    taken = run((1, 1.0), (2, 1.0))
    assert run((9, math.nan), (1, 1.0), (2, 1.0), (9, math.inf)) == taken != run((1, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["fails", "full"])
def test_a_fault_at_every_call_of_a_save_leaves_a_valid_checkpoint(example, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(checkpoint_manager, "PAUSE_SECONDS", 0)
    with pytest.MonkeyPatch.context() as patch:
        counted = FaultyOS(patch)
        save(shutil.copytree(example[0], tmp_path / "counted"), *example[1:], 3)
    assert counted.names.count("fsync") == 7  # two files of shards, two of the rest, the manifest, two folders
    for at, name in enumerate(counted.names):
        run = shutil.copytree(example[0], tmp_path / f"{fault}-{at}")
        _, newest = save_with_a_fault(run, *example[1:], at, fault)
        restore_weights(tiny(), newest)
        save(run, *example[1:], 4)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"], (fault, at, name)


def test_every_flipped_bit_and_truncation_is_found(example, tmp_path, capsys):
    run, chance = shutil.copytree(example[0], tmp_path / "run"), random.Random(0)
    newest, before = find_checkpoints(run)
    for number, path in zip(range(FLIPS), itertools.cycle(sorted(newest.iterdir()))):
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        path.write_bytes(
            content[:at]
            if number % 3 == 2
            else content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        )
        assert verify_checkpoint(newest), (number, path.name)
        assert number % 20 or newest_checkpoint(run) == before
        path.write_bytes(content)
    assert verify_checkpoint(newest) is None


def safetensors_header(header: bytes):
    def write(path):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)

    write.__name__ = f"header_{len(header)}"
    return write


def names_of_no_tensor(path):
    state = torch.load(path, weights_only=True)
    for values in state["optimizers"][0]["state"].values():
        values["exp_avg"] = "__import__('os').mkdir('executed')"
    torch.save(state, path)


PART = b'"model.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
@pytest.mark.parametrize(
    "name, how",
    [
        ("model-00001-of-00001.safetensors", raw_pickle),
        ("model-00001-of-00001.safetensors", torch_file),
        ("model-00001-of-00001.safetensors", safetensors_header(b"{" + PART + b"}")),
        *(
            (
                "model-00001-of-00001.safetensors",
                safetensors_header(b'{"__metadata__":{"DCP_SHARDING_INFO":"%s"},%s}' % (info, PART)),
            )
            for info in (
                b"[",
                b"[]",
                b"{}",
                b"[" * 5000,
                rb"{\"model.bias\":{\"saved_offsets\":[\"x\"]}}",
                rb"{\"model.bias\":{\"saved_offsets\":[-9]}}",
            )
        ),
        ("optimizer-00001-of-00001.safetensors", raw_pickle),
        ("optimizer.pt", raw_pickle),
        ("optimizer.pt", torch_file),
        ("optimizer.pt", names_of_no_tensor),
        ("trainer_state.pt", torch_file),
        (".metadata", raw_pickle),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_hostile_checkpoint_executes_nothing(example, tmp_path, monkeypatch, name, how, full):
    monkeypatch.chdir(tmp_path)
    place = shutil.copytree(find_checkpoints(example[0])[0], tmp_path / "step-00000002")
    how(place / name)
    manifest = read_manifest(place)
    for entry in manifest["files"]:  # made true again, as an attacker would
        entry.update(size=(place / entry["name"]).stat().st_size, sha256=file_sha256(place / entry["name"]))
    (place / MANIFEST).write_bytes(manifest_bytes(manifest))
    model, optimizer = (fresh := tiny(), build_optimizer(fresh, CONFIG)) if full else trained(1)
    if name == ".metadata":  # which the usual reader of sharded checkpoints would unpickle
        assert load_training_state(place, model, optimizer)["step"] == 2
    else:
        with pytest.raises(UserError) as refusal:
            load_training_state(place, model, optimizer)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_layers_are_compiled_once_however_many_there_are(group, monkeypatch, name):
    """Layer by layer, traced without a compiler backend: the same gradients as the eager model."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="eager", **how))
    Model, ModelArgs = get_model_and_args(name)
    args = tiny_args(Model, ModelArgs)[0]
    usual = {"layer_types": ()} if hasattr(args, "layer_types") else {}
    args = replace(args, n_layers=10, **usual)  # more than the 8 variants that a function may have
    full, ids = Model(args).train(), torch.randint(args.vocab_size, (2, 20))
    model, compiled = copy.deepcopy(full), torch._dynamo.utils.counters["stats"]
    fsdp.shard(model, torch.device("cpu"), "fp32", compiled=True)
    graphs = []
    for _ in range(2):
        for either in (full, model):
            either(ids, ids.roll(-1, 1))[1].backward()
        graphs.append(compiled["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]
    for (key, ours), theirs in zip(model.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(fsdp.full_tensor(ours.grad), theirs.grad, msg=key)
    torch._dynamo.reset()


def test_unsupported_settings_are_refused(group, tmp_path):
    with pytest.raises(UserError, match="does not support --precision=fp16"):
        fsdp.shard(tiny(), torch.device("cpu"), "fp16", compiled=False)
    model = tiny()
    model.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="--parallel=fsdp cannot shard scale"):
        fsdp.shard(model, torch.device("cpu"), "fp32", compiled=False)
