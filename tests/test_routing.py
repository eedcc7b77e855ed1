"""The routing bias under real training: it does not depend on how a step's sequences are divided."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from model.deepseekv3 import DeepSeekV3Model
from tests.support.make_tokenizer import make_tokenizer
from tests.support.paths import ROOT
from tests.support.token_files import pretrain_files

STEPS, GAMMA = 4, 0.01


def train(folder, processes: int, sequences_per_pass: int):
    """Four steps of eight sequences by pretrain.py; {name: routing bias} at the end."""
    settings = {
        "model_name": DeepSeekV3Model.model_name,
        "device": "cpu",
        "global_batch_size": 8,
        "max_batch_size": sequences_per_pass,
        "max_steps": STEPS,
        "max_seq_len": 32,
        "max_lr": 0.01,
        "sample_interval": 0,
        "eval_interval": 0,
        "tokenizer_path": folder / "tokenizer",
        "pretrain_data_path": folder / "data/pretrain_train.bin",
        "output_path": folder / f"{processes}",
        "model.dim": 32,
        "model.n_layers": 3,
        "model.n_heads": 2,
        "model.q_lora_rank": 16,
        "model.kv_lora_rank": 8,
        "model.qk_nope_head_dim": 8,
        "model.qk_rope_head_dim": 4,
        "model.v_head_dim": 8,
        "model.inter_dim": 48,
        "model.moe_inter_dim": 16,
        "model.n_routed_experts": 6,
        "model.n_activated_experts": 2,
        "model.bias_update_speed": GAMMA,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    launch = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    done = subprocess.run(
        [*launch, str(ROOT / "pretrain.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    weights = load_file(folder / f"{processes}/pretrain_{DeepSeekV3Model.model_name}/final/model.safetensors")
    return {name: tensor for name, tensor in weights.items() if name.endswith("routing_bias")}


@pytest.mark.slow
def test_two_ranks_and_four_micro_batches_move_the_bias_as_one_batch(tmp_path):
    pretrain_files(tmp_path / "data", make_tokenizer(tmp_path / "tokenizer"))
    one, two = train(tmp_path, 1, 8), train(tmp_path, 2, 1)
    assert len(one) == 3 and one.keys() == two.keys()  # two layers with experts, one MTP module
    for name, bias in one.items():
        assert bias.equal(two[name]), f"{name}: {bias} and {two[name]}"
        assert bias.abs().max() > GAMMA  # it moved, and more than once
