"""What a test reads from a run, and a run that a signal stops."""

import os
import signal

import torch

from engine.runs.metrics import read_metrics
from tests.support.tiny_model import TinyModel


def losses(summary, key="loss"):
    return [record[key] for record in read_metrics(os.path.join(summary["run"], "metrics.jsonl")) if key in record]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(training, monkeypatch, steps, **settings):
    """Train, with a SIGTERM that arrives during step `steps`."""

    def before_step(self, step, total_steps):
        if step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TinyModel, "before_step", before_step)
        return training.run(**settings)
