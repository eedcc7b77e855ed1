"""A tiny trained model, and a run with its checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from engine.runs.checkpoint import newest_checkpoint, step_of
from engine.runs.checkpoint_manager import CheckpointManager
from engine.training.optim import build_optimizer
from tests.support.faulty_disk import Died, FaultyOS
from tests.support.tiny_model import TinyModel, TinyModelArgs
from utils.errors import UserError

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


def config_with(**changed):
    """CONFIG with other settings."""
    return SimpleNamespace(**{**vars(CONFIG), **changed})


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
    config = config_with(keep_last=2)
    for step in (1, 2):
        CheckpointManager(run, config, model, optimizer, {"stage": "pretrain"}).save({"step": step, "tokens": step}, {})
    return run, model, optimizer


def save(run, model, optimizer, step):
    CheckpointManager(run, CONFIG, model, optimizer, {"stage": "pretrain"}).save(
        {"step": step, "tokens": step}, {}, must=True
    )


def save_with_a_fault(run, model, optimizer, at, fault):
    """Save step 3 in a run with checkpoint 2, with `fault` at call `at`; returns how it ended and what is the newest.

    The newest checkpoint is then a valid one of step 2 or 3, of step 3 when the save succeeded.
    """
    ended = "saved"
    with pytest.MonkeyPatch.context() as patch:
        faulty = FaultyOS(patch, at, fault)
        try:
            save(run, model, optimizer, 3)
        except UserError as error:
            assert "could not be saved" in str(error)
            ended = "refused"
        except Died:
            ended = "died"
    newest = newest_checkpoint(run)
    assert newest is not None and step_of(newest) in ((3,) if ended == "saved" else (2, 3)), (fault, at, faulty.names)
    return ended, newest
