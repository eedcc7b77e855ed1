"""The model card (README.md) of an exported model: what it is, its results, and how to load it."""

import dataclasses
from typing import Any

from model.basemodel import BaseModel

FIGURES = {
    "steps": "training steps",
    "tokens": "training tokens",
    "train_loss": "training loss, nats per token",
    "val_loss": "held-out loss, nats per token",
    "val_bpc": "held-out bits per character",
}


def model_card(name: str, stage: str, model: BaseModel, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return the text of the card. summary: the run's summary.json, or {} when it has none."""
    counts = model.num_params()
    rows = {"parameters": f"{counts['total']:,}", "active parameters per token": f"{counts['active']:,}"}
    for key, label in FIGURES.items():
        if summary.get(key) is not None:
            value = summary[key]
            rows[label] = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    fields = "\n".join(f"| {key} | {value} |" for key, value in dataclasses.asdict(model.args).items())
    chat = "pretrain" not in stage
    prompt = (
        (
            'ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], '
            'add_generation_prompt=True, return_tensors="pt", return_dict=False)'
        )
        if chat
        else 'ids = tokenizer("Hello", return_tensors="pt").input_ids'
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small {config["architectures"][0]}, {"fine-tuned for conversation" if chat else "pretrained: it continues a text"},
trained with Mini-LLM. Weights in fp32.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{prompt}
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
```

Back to a run folder: `python export.py --from hf {name} --out output/imported_{name}`.

| architecture | |
| --- | --- |
{fields}
"""
