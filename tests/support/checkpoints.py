"""A tiny trained model, and a run with its checkpoints."""

from types import SimpleNamespace

import torch

from engine.runs.checkpoint_manager import CheckpointManager
from engine.training.optim import build_optimizer
from tests.support.tiny_model import TinyModel, TinyModelArgs

CONFIG = SimpleNamespace(
    keep_last=1,
    keep_every=0,
    keep_best=False,
    save_interval=1,
    optimizer="muon",
    max_lr=0.01,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    embed_lr_scale=1.0,
    scalar_lr_scale=1.0,
    ema=0.0,
)


def trained(seed=0, prepare=lambda model: None):
    """A tiny model, after `prepare(model)`, and its optimizer after a step."""
    torch.manual_seed(seed)
    model = TinyModel(TinyModelArgs(vocab_size=32, max_seq_len=8))
    prepare(model)
    optimizer = build_optimizer(model, CONFIG)
    ids = torch.randint(32, (2, 8))
    model(ids, ids)[1].backward()
    optimizer.step(torch.tensor(True))
    return model, optimizer


def two_checkpoints(run, model, optimizer):
    """Make `run` a run with checkpoints 1 and 2; returns all three."""
    run.mkdir()
    config = SimpleNamespace(**{**vars(CONFIG), "keep_last": 2})
    for step in (1, 2):
        CheckpointManager(run, config, model, optimizer, {"stage": "pretrain"}).save({"step": step, "tokens": step}, {})
    return run, model, optimizer


def save(run, model, optimizer, step):
    CheckpointManager(run, CONFIG, model, optimizer, {"stage": "pretrain"}).save(
        {"step": step, "tokens": step}, {}, must=True
    )
