"""Evaluates a fine-tuned run on held-out poems and fixed requests: `python demo/evaluate.py --run output/sft_MODEL`."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils.openmp  # noqa: F401  before PyTorch is loaded
from demo import poems, report
from demo.bits import bits_per_character
from engine.distributed.process_group import find_device
from engine.inference.generate import generate
from engine.inference.options import GenerationOptions
from engine.runs.registry import load_run
from model.basemodel import BaseModel
from preprocess_data.corpora.demo_chat import poem_request
from utils.atomic import write_text
from utils.chat_template import encode_chat
from utils.config import opt, parse
from utils.errors import UserError, run_script
from utils.files import load_json
from utils.log import Progress, log
from utils.tokenizer import Tokenizer

# Each of the five tasks of the chat examples, in their words.
REQUESTS = [
    poem_request("春夜", "五言绝句"),
    poem_request("江上送别", "七言律诗"),
    "请接下句：床前明月光，",
    "“春眠不觉晓，处处闻啼鸟。”是谁写的？",
    "“画蛇添足”是什么意思？",
    "哪个成语的意思是：比喻做了多余的事，非但无益，反而不合适。",
]


@dataclass
class EvaluateConfig(GenerationOptions):
    """Evaluates the demo: form, rhyme and copied verses of poems on held-out titles, and a few answers to read."""

    run: str = opt("", "run folder of the fine-tuned model", path=True)
    pretrain_run: str = opt(
        "", "run folder whose bits per character are measured; empty: the one `run` started from", path=True
    )
    corpora_path: str = opt("output/corpora", "folder with poems.jsonl", path=True)
    poems: int = opt(100, "poems to sample, equally many of each form")
    bits_poems: int = opt(1500, "held-out poems, of any form, over which bits per character are measured")
    batch_size: int = opt(25, "poems sampled at a time")
    max_new_tokens: int = opt(96, "maximum length of an answer in tokens")
    temperature: float = opt(0.8, "0 is greedy, higher is more varied")
    seed: int = opt(1, "of the choice of titles and of the sampling")


def ask(model: BaseModel, tokenizer: Tokenizer, requests: list[str], config: EvaluateConfig, seed: int) -> list[str]:
    """Return the answers of the model to single requests, all sampled in one batch."""
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": request}], add_generation_prompt=True)[0]
        for request in requests
    ]
    answers = generate(model, tokenizer, prompts, config.max_new_tokens, **{**config.sampling(), "seed": seed})
    return [tokenizer.decode(answer).strip() for answer in answers]


def write_poems(
    model: BaseModel, tokenizer: Tokenizer, asked: list[tuple[str, str]], config: EvaluateConfig
) -> list[str]:
    """Return one sampled poem for every (title, form) pair."""
    progress = Progress(len(asked), label="poems")
    texts: list[str] = []
    for start in range(0, len(asked), config.batch_size):
        batch = asked[start : start + config.batch_size]
        requests = [poem_request(title, form) for title, form in batch]
        texts += ask(model, tokenizer, requests, config, seed=(config.seed * 100_003 + start) % 2**63)
        progress.update(len(texts), f"{len(texts)} written")
    progress.close()
    return texts


def tokens_seen(run: Path) -> int | None:
    """Return the training tokens of a run, padding excluded; None for weights that were not trained here."""
    summary = run / "summary.json"
    return load_json(summary, "train again").get("tokens") if summary.exists() else None


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate the run, write demo.json into its folder, and return its content."""
    run = Path(config.run)
    loaded = load_run(run, device=find_device(config.device))
    model = loaded.model
    tokenizer = loaded.tokenizer
    held_out, documents, training_verses = poems.load_poems(Path(config.corpora_path) / "poems.jsonl")
    asked = poems.choose_titles(held_out, config.poems, config.seed)
    texts = write_poems(model, tokenizer, asked, config)
    forms = [form for _, form in asked]

    def counts(of: list[str], wanted: list[str]) -> dict[str, Any]:
        return dataclasses.asdict(poems.count(of, wanted, training_verses))

    real, real_forms = poems.real_poems(held_out, each=500, seed=config.seed)
    by_form = {
        form: counts([text for text, asked_form in zip(texts, forms) if asked_form == form], [form] * forms.count(form))
        for form in held_out
    }
    pretrain_run = Path(config.pretrain_run or loaded.config["init_from"])
    pretrained = load_run(pretrain_run, device=find_device(config.device))
    documents = documents[: config.bits_poems]
    answers = ask(model, tokenizer, REQUESTS, config, seed=config.seed)
    result = {
        "settings": dataclasses.asdict(config),
        "pretrain_bits_per_character": bits_per_character(pretrained.model, pretrained.tokenizer, documents),
        "bits_poems": len(documents),
        "tokens": {"pretraining": tokens_seen(pretrain_run), "fine-tuning": tokens_seen(run)},
        "model": counts(texts, forms),
        "by_form": by_form,
        "real_poems": counts(real, real_forms),
        "shuffled_poems": counts(poems.shuffled_poems(real, config.seed), real_forms),
        "poems": [{"title": title, "form": form, "text": text} for (title, form), text in zip(asked, texts)],
        "answers": [{"request": request, "answer": answer} for request, answer in zip(REQUESTS, answers)],
    }
    write_text(run / "demo.json", json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    return result


def main() -> None:
    """Evaluate and print."""
    config = parse(EvaluateConfig)
    if not config.run:
        raise UserError("no run: pass --run=output/sft_MODEL, the folder of a fine-tuned model")
    log(report.report(evaluate(config)))


if __name__ == "__main__":
    run_script(main)
