"""What the model writes at fixed prompts while it learns: samples.md."""

import torch

from engine.generate import generate
from utils.log import warn


def write_samples(path, step: int, model, tokenizer, prompts: list[list[int]], autocast, seed: int,
                  tokens: int = 64) -> str:
    """Append one generation a prompt under a heading of the step, and return the text (Markdown)."""
    try:
        with torch.no_grad(), autocast():
            answers = [generate(model, tokenizer, [prompt], tokens, temperature=0.8, top_p=0.95, seed=seed)[0]
                       for prompt in prompts]
    except ValueError as error:  # a model that cannot talk yet (its logits overflow) must not end its training
        warn(f"no samples at step {step}: {error}")
        return ""
    text = f"## Step {step}\n\n"
    for prompt, answer in zip(prompts, answers):
        shown, written = (tokenizer.decode(ids, skip_special=True).strip() for ids in (prompt, answer))
        # indented, so that nothing a model writes is taken for Markdown
        text += "\n".join("    " + line for line in f"{shown} ⟶ {written}".splitlines()) + "\n\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
    return text
