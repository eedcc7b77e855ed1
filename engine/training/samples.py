"""Text that the model generates from fixed prompts during training: samples.md."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from engine.inference.generate import generate
from model.basemodel import BaseModel
from utils.atomic import write_text
from utils.log import warn
from utils.tokenizer import Tokenizer


def write_samples(
    path: Path | None,
    step: int,
    model: BaseModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    compute_dtype: Callable[[], AbstractContextManager],
    seed: int,
    tokens: int = 64,
) -> str:
    """Append one generation per prompt under a heading of the step, and return the text (Markdown).

    path: the file, or None for the text alone. tokens: the most per generation.
    """
    try:
        with torch.no_grad(), compute_dtype():
            answers = [
                generate(model, tokenizer, [prompt], tokens, temperature=0.8, top_p=0.95, seed=seed)[0]
                for prompt in prompts
            ]
    except ValueError as error:  # non-finite logits early in training must not end the run
        warn(f"no samples at step {step}: {error}")
        return ""
    heading = f"## Step {step}\n\n"
    text = heading
    for prompt, answer in zip(prompts, answers):
        shown, written = (tokenizer.decode(ids, skip_special=True).strip() for ids in (prompt, answer))
        # indented, so that generated text is not rendered as Markdown
        text += "\n".join("    " + line for line in f"{shown} ⟶ {written}".splitlines()) + "\n\n"
    if path is None:
        return text
    try:
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        # a process that died after this step may have written it already
        write_text(path, before.partition(heading)[0] + text)
    except OSError as error:
        warn(f"{path} could not be written ({error}); the run continues")
    return text
