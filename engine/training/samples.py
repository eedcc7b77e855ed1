"""What the model writes at fixed prompts while it learns: samples.md."""

import torch

from engine.inference.generate import generate
from utils.atomic import write_text
from utils.log import warn


def write_samples(
    path, step: int, model, tokenizer, prompts: list[list[int]], autocast, seed: int, tokens: int = 64
) -> str:
    """Append one generation a prompt under a heading of the step, and return the text (Markdown). path: None, no file."""
    try:
        with torch.no_grad(), autocast():
            answers = [
                generate(model, tokenizer, [prompt], tokens, temperature=0.8, top_p=0.95, seed=seed)[0]
                for prompt in prompts
            ]
    except ValueError as error:  # a model that cannot talk yet (its logits overflow) must not end its training
        warn(f"no samples at step {step}: {error}")
        return ""
    text = head = f"## Step {step}\n\n"
    for prompt, answer in zip(prompts, answers):
        shown, written = (tokenizer.decode(ids, skip_special=True).strip() for ids in (prompt, answer))
        # indented, so that nothing a model writes is taken for Markdown
        text += "\n".join("    " + line for line in f"{shown} ⟶ {written}".splitlines()) + "\n\n"
    if path is None:
        return text
    try:
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        write_text(path, before.partition(head)[0] + text)  # an earlier process may have come here before it died
    except OSError as error:
        warn(f"{path} could not be written ({error}); the run goes on")
    return text
