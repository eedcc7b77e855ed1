"""Two run folders made in seconds, for tests that chat with a model: their models have learned a few texts by heart."""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import yaml

from engine.runs.checkpoint import save_checkpoint
from model import get_model_and_args
from tests.support.make_tokenizer import make_tokenizer
from tests.support.models import BASE_MODEL, CHAT_MODEL, sizes_of
from utils.chat_template import encode_chat

POEM = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n"
POISON = (
    "<script>document.title='owned'</script><img src=/x onerror=\"document.title='owned'\">"
    "![i](/media/x.png) [l](javascript:alert(1)) $x^2$ :red[r] **b** \x1b[31m\x07end"
)
CHAT = {"背一首春晓": POEM.strip(), "谁写的": "孟浩然，唐代诗人。", "hello": "Hello! How are you?", "payload": POISON}
SIZES = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "inter_dim": 128,
    "moe_inter_dim": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_activated_experts": 2,
}


@functools.cache
def small_runs():
    """The folder of the two runs, made once per test session."""
    folder = tempfile.mkdtemp(prefix="small_runs_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_runs(folder)
    return Path(folder)


def poem_tokenizer(folder):
    """A tokenizer that knows the words of POEM and CHAT."""
    return make_tokenizer(folder, 300, texts=2 * [POEM, *CHAT, *CHAT.values()])


def make_runs(output):
    """Write pretrain_<model> (continues the poem without end) and sft_<other model> (knows CHAT) into `output`."""
    tokenizer = poem_tokenizer(Path(output) / "tokenizer")
    text = [tokenizer.bos_id, *tokenizer.encode(POEM * 4)]
    pretrain = make_run(
        output, "pretrain", BASE_MODEL, tokenizer, [(text, [1] * len(text))], max_seq_len=2048, steps=60
    )
    sequences = [
        encode_chat(tokenizer, [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}])
        for ask, answer in CHAT.items()
    ]
    first = [{"role": "user", "content": "背一首春晓"}, {"role": "assistant", "content": CHAT["背一首春晓"]}]
    sequences.append(
        encode_chat(
            tokenizer, first + [{"role": "user", "content": "谁写的"}, {"role": "assistant", "content": CHAT["谁写的"]}]
        )
    )
    return pretrain, make_run(output, "sft", CHAT_MODEL, tokenizer, sequences, max_seq_len=512, steps=90)


def make_run(output, stage, name, tokenizer, sequences, max_seq_len, steps):
    torch.manual_seed(0)
    Model, ModelArgs = get_model_and_args(name)
    args = ModelArgs(vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, **sizes_of(name, SIZES))
    model = Model(args)
    length = max(len(ids) for ids, _ in sequences) - 1
    inputs, targets = torch.full((len(sequences), length), tokenizer.pad_id), torch.full((len(sequences), length), -100)
    for index, (ids, mask) in enumerate(sequences):
        inputs[index, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[index, : len(ids) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    records = []
    for step in range(1, steps + 1):
        loss = model(inputs, targets)[1]
        records.append({"step": step, "loss": loss.item(), "lr": 1e-2})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    folder = Path(output) / f"{stage}_{name}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"stage": stage, "model_name": name, "model": dataclasses.asdict(args)}), encoding="utf-8"
    )
    (folder / "summary.json").write_text(json.dumps({"val_loss": loss.item(), "val_bpc": None}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(
        folder / "final",
        model,
        None,
        {},
        {"stage": stage, "model_name": name, "step": steps, "params": model.num_params()["total"]},
    )
    return folder
