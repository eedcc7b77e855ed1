"""--dry_run: estimates of the full run from one measured step, and not a byte written."""

import pytest
import torch

from engine.planning.dry_run import saved_bytes


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_figures_are_those_of_the_run(training, capsys):
    settings = dict(max_batch_size=4, global_batch_size=8, max_steps=40, eval_interval=15, eval_batches=1)
    before = files(training.path)
    about = training.run(**settings, dry_run=True, price_per_hour=2.0, keep_last=3, save_interval=10, peak_tflops=0.001)
    assert files(training.path) == before
    shown = capsys.readouterr().out
    assert "nothing is written" in shown and "cost" in shown and "0.001 TFLOPS (--peak_tflops)" in shown

    sizes = {name: p.numel() for name, p in training.model.named_parameters()}
    total, embedding = sum(sizes.values()), sizes["tok_embed.weight"]
    assert about["params"] == {"total": total, "active": total, "embedding": embedding}
    assert about["flops_per_token"] == 6 * (total - embedding)
    assert (about["steps"], about["tokens"], about["global_sequences"], about["accumulation"]) == (
        40,
        40 * 8 * 32,
        8,
        2,
    )
    assert about["epochs"] == pytest.approx(40 * 8 / len(training.sequences))
    matrices = sum(sizes[f"layers.{i}.weight"] for i in range(2))  # Muon's, with one moment; the others have two
    memory = about["memory"]
    assert (memory["weights"], memory["gradients"]) == (4 * total + 16, 4 * total)  # and a buffer of four numbers
    assert memory["optimizer"] == 4 * (2 * total - matrices)
    assert memory["predicted"] == sum(memory[k] for k in ("weights", "gradients", "optimizer", "activations"))
    assert about["step_seconds"] > 0 and about["training_seconds"] == pytest.approx(40 * about["step_seconds"])
    n_sequences = 2 * min(8, len(training.val)) + len(
        training.val
    )  # two evaluations of 8 sequences, and all of them at the end
    assert about["evaluation_seconds"] == pytest.approx(n_sequences / 8 * about["step_seconds"] / 3)
    assert about["cost"] == pytest.approx((about["training_seconds"] + about["evaluation_seconds"]) / 3600 * 2)
    assert about["checkpoints"] == 4 and about["disk_bytes"] == 5 * about["checkpoint_bytes"] + about["final_bytes"]

    summary = training.run(**settings)
    assert (summary["steps"], summary["params"]) == (40, about["params"])
    for part, predicted in (("final", about["final_bytes"]), ("checkpoints/step-00000040", about["checkpoint_bytes"])):
        folder = training.path / "output/pretrain_tiny" / part
        written = sum(
            (folder / name).stat().st_size for name in ("model.safetensors", "optimizer.pt") if (folder / name).exists()
        )
        assert predicted <= written <= predicted + 8000  # names and shapes
    training.run(**settings, dry_run=True)  # where a finished run lies, too
    assert "is finished" not in capsys.readouterr().out


def test_a_run_of_one_step_with_a_ramp_can_be_measured(training):
    about = training.run(max_steps=1, dry_run=True)
    assert about["steps"] == 1 and about["cost"] == 0
    about = training.run(max_steps=40, batch_ramp_ratio=0.5, max_batch_size=4, dry_run=True)
    assert about["tokens"] == (10 * 1 + 10 * 2 + 20 * 4) * 32
    assert about["training_seconds"] == pytest.approx(about["step_seconds"] * 27.5)


def test_saved_bytes_are_what_the_graph_holds():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, x):
            y = (self.weight * x).exp()  # keeps x and the result
            return y.view(-1)[:10].square().sum()  # keeps a part of the result: the same memory

    x = torch.ones(50, 1000)
    assert saved_bytes(Model(), {"x": x}, torch.device("cpu"), torch.enable_grad) == 2 * 4 * 50 * 1000
