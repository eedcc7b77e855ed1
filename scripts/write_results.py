"""Writes the measured figures of README and docs/results, in both languages, from benchmarks/results/*.json.

    python scripts/write_results.py            fills every block between `<!-- results: NAME -->` and `<!-- end -->`
    python scripts/write_results.py --check    changes nothing; ends with 1 and names the pages that differ

A figure that was measured is written nowhere else.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = {"README.md": "en", "README.zh-CN.md": "zh", "docs/results.md": "en", "docs/results.zh-CN.md": "zh"}
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

TRANSFORMERS = ("transformers fp32", "transformers bf16")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


MODELS = load("models")  # {model name: {language: its label}}


def table(head: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


def times(ratio: float, lang: str) -> str:
    return f"{ratio:.1f}x" if lang == "en" else f"{ratio:.1f} 倍"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M"


def measured(about: dict, lang: str) -> str:
    """Return the line below a table: when, where and by which command it was measured."""
    machine = about.get("machine") or f"{about['processor']}, {about['cores']} cores"
    command = about["command"]
    if lang == "en":
        return f"Measured on {about['date']} on {machine}: `{command}`"
    return f"测于 {about['date']}，{machine}：`{command}`"


def size(figures: dict) -> str:
    total = millions(figures["parameters"])
    active = millions(figures["active"])
    return total if total == active else f"{total} ({active} active)"


def seen(figures: dict) -> str:
    """Return the tokens that the demo trained on; rows measured before 2026-11-29 have none."""
    return millions(figures["tokens"]) if "tokens" in figures else ""


def fastest(figures: dict[str, float]) -> float:
    """Return the better of transformers' precisions, in tokens per second."""
    return max(figures[name] for name in TRANSFORMERS)


def overview(lang: str) -> str:
    """The one table of the README: a line per architecture."""
    demo = load("demo")
    train = {row["model"]: row for row in load("train")["speed"].values()}
    decode = load("decode")["tokens_per_s"]
    head = {
        "en": ["", "parameters", "tokens seen", "held-out bits per character", "poems in form", "demo on 2 cores"]
        + ["training against transformers, compiled", "decoding against transformers, int8"],
        "zh": ["", "参数量", "训练词元", "验证集比特/字", "合体的诗", "演示用时（2 核）"]
        + ["训练速度，与 transformers 相比（均编译）", "解码速度，与 transformers 相比（int8）"],
    }[lang]
    body = []
    for model, figures in demo["models"].items():
        speed = decode.get(f"{model} x1")
        body.append(
            [
                f"`{model}`",
                size(figures),
                seen(figures),
                f"{figures['bits_per_character']:.3f}",
                percent(figures["form"]),
                f"{figures['seconds'] / 60:.0f} min",
                times(train[model]["ratio_compiled"], lang) if model in train else "",
                times(speed["ours int8 compiled"] / fastest(speed), lang) if speed else "",
            ]
        )
    return table(head, body) + "\n\n" + measured(demo, lang)


def demo(lang: str) -> str:
    results = load("demo")
    names = {
        "en": {"real": "real held-out poems", "shuffled": "their verses, shuffled"},
        "zh": {"real": "验证集里的真诗", "shuffled": "打乱诗句"},
    }[lang]
    head = {
        "en": [
            "",
            "parameters",
            "tokens seen",
            "held-out bits per character",
            "form",
            "rhyme",
            "copied",
            "full run on 2 cores",
        ],
        "zh": ["", "参数量", "训练词元", "验证集比特/字", "合体", "押韵", "抄录", "两核全程用时"],
    }[lang]
    body = []
    for model, figures in results["models"].items():
        shares = [percent(figures["form"]), percent(figures["rhyme"]), percent(figures["copied"], 1)]
        minutes = f"{figures['seconds'] / 60:.0f} min"
        bits = f"{figures['bits_per_character']:.3f}"
        body.append([f"`{model}`", size(figures), seen(figures), bits, *shares, minutes])
    for kind, figures in results["references"].items():
        shares = [percent(figures["form"]), percent(figures["rhyme"], 1), percent(figures["copied"], 1)]
        body.append([names[kind], "", "", "", *shares, ""])
    return table(head, body) + "\n\n" + measured(results, lang)


def recipe(lang: str) -> str:
    results = load("recipe")
    head = {
        "en": ["", "AdamW: best rate", "its held-out loss", "tokens needed", "seconds needed"],
        "zh": ["", "AdamW：最佳学习率", "其验证集损失", "所需词元", "所需时间"],
    }[lang]
    to = {"en": "to", "zh": "至"}[lang]

    def spread(figures: dict, name: str) -> str:
        each = [seed[name] for seed in figures["seeds"].values()]
        return f"{percent(figures['mean'][name])} ({percent(min(each))} {to} {percent(max(each))})"

    body = []
    for model, figures in results["results"].items():
        losses = [seed["loss"] for seed in figures["seeds"].values()]
        loss = f"{sum(losses) / len(losses):.3f}"
        needed = [spread(figures, "tokens"), spread(figures, "seconds")]
        body.append([f"`{model}`", f"{figures['best_lr']:g}", loss, *needed])
    return table(head, body) + "\n\n" + measured(results["about"], lang)


def preprocess(lang: str) -> str:
    results = load("preprocess")
    names = {
        "en": {
            "ours": "ours (gigatoken, the same ids)",
            "ours, --encoder=tokenizers": "ours, `--encoder=tokenizers`",
            "encode_batch_fast": "a script with `encode_batch_fast`, all cores",
            "line by line": "a script that encodes line by line",
        },
        "zh": {
            "ours": "本项目（gigatoken，词元编号完全相同）",
            "ours, --encoder=tokenizers": "本项目，`--encoder=tokenizers`",
            "encode_batch_fast": "用 `encode_batch_fast` 的脚本，全部核心",
            "line by line": "逐行编码的脚本",
        },
    }[lang]
    head = {
        "en": ["", "MB/s", "against line by line", "against `encode_batch_fast`"],
        "zh": ["", "MB/s", "相对逐行编码", "相对 `encode_batch_fast`"],
    }[lang]
    body = []
    for name, label in names.items():
        figures = results["speed"]["contenders"][name]
        ratios = [times(figures["times_line_by_line"], lang), times(figures["times_encode_batch_fast"], lang)]
        body.append([label, f"{figures['mb_per_second']:.1f}", *ratios])
    peaks = [f"{name}: {figures['peak_mb']} MB" for name, figures in results["memory"].items() if name.endswith(" MB")]
    memory = {"en": "Peak memory of all processes together", "zh": "所有进程合计的内存峰值"}[lang]
    below = f"{memory}: {'; '.join(peaks)}.\n\n{measured(results['speed'], lang)}"
    return table(head, body) + "\n\n" + below


def train(lang: str) -> str:
    results = load("train")
    head = {
        "en": ["tokens per second", "transformers, eager", "compiled", "ours, eager", "compiled", "ratio, eager"]
        + ["ratio, compiled", "share of the matmul rate, eager", "compiled"],
        "zh": ["词元/秒", "transformers，不编译", "编译", "本项目，不编译", "编译", "倍数，不编译"]
        + ["倍数，编译", "占矩阵乘法速率的比例，不编译", "编译"],
    }[lang]
    body = []
    for row in results["speed"].values():
        rates = row["tokens_per_s"]
        speeds = [f"{rates[f'{who} {how}']:,.0f}" for who in ("theirs", "ours") for how in ("eager", "compiled")]
        ratios = [f"{row['ratio_eager']:.2f}", f"{row['ratio_compiled']:.2f}"]
        shares = [percent(row["flops_share"][f"ours {how}"]) for how in ("eager", "compiled")]
        body.append([MODELS[row["model"]][lang], *speeds, *ratios, *shares])
    memory_head = {
        "en": ["peak memory of a step", "transformers, MiB", "ours, MiB", "share"],
        "zh": ["一步的内存峰值", "transformers，MiB", "本项目，MiB", "比例"],
    }[lang]
    memory = [
        [MODELS[model][lang], f"{row['theirs']:,.0f}", f"{row['ours']:,.0f}", percent(row["share"])]
        for model, row in results["memory"].items()
    ]
    about = next(iter(results["speed"].values()))["about"]
    return table(head, body) + "\n\n" + table(memory_head, memory) + "\n\n" + measured(about, lang)


def decode(lang: str) -> str:
    results = load("decode")
    head = {
        "en": ["tokens per second", "requests", "transformers, the better of fp32 and bf16", "llama.cpp f16, q8_0"]
        + ["ours compiled, bf16", "ours compiled, int8"],
        "zh": ["词元/秒", "请求数", "transformers，fp32 与 bf16 中较快者", "llama.cpp f16、q8_0"]
        + ["本项目，编译，bf16", "本项目，编译，int8"],
    }[lang]
    body = []
    for name, figures in results["tokens_per_s"].items():
        model, requests = name.split(" x")
        base = fastest(figures)
        llama_cpp = ", ".join(f"{figures[k]:,.0f}" for k in ("llama.cpp f16", "llama.cpp q8_0") if k in figures)
        ours = [figures[f"ours {precision} compiled"] for precision in ("bf16", "int8")]
        cells = [f"{rate:,.0f} ({times(rate / base, lang)})" for rate in ours]
        body.append([MODELS[model][lang], requests, f"{base:,.0f}", llama_cpp, *cells])
    about = next(iter(results["abouts"].values()))
    return table(head, body) + "\n\n" + measured(about, lang)


def positions(lang: str) -> str:
    results = load("decode")
    head = {"en": "ms per decode step behind so many tokens", "zh": "在若干词元之后每步毫秒数"}[lang]
    ours = {"en": "ours, compiled, bf16", "zh": "本项目，编译，bf16"}[lang]
    columns = list(next(iter(results["positions"].values()))["ours"])
    body = []
    for model, figures in results["positions"].items():
        for who, label in (("ours", ours), ("transformers", "transformers")):
            cells = [f"{figures[who][column]:.2f}" for column in columns]
            body.append([f"{MODELS[model][lang]}, {label}", *cells])
    return table([head, *(f"{int(column):,}" for column in columns)], body)


def speculation(lang: str) -> str:
    results = load("speculative")
    head = {
        "en": ["greedy", "identical texts", "drafts accepted", "fewer forward passes", "speed"],
        "zh": ["贪心解码", "文本相同", "草稿被接受", "前向次数减少", "速度"],
    }[lang]
    body = []
    for kind, figures in results["greedy"].items():
        if kind != "plain":
            shown = [figures["identical"], percent(figures["accepted"]), times(figures["fewer_calls"], lang)]
            name = f"`--speculative={'draft' if kind == 'mtp' else kind}`"
            body.append([name, *shown, times(figures["faster"], lang)])
    return table(head, body) + "\n\n" + measured(results, lang)


def first_token(lang: str) -> str:
    results = load("first_token")
    median = results["median_seconds"]
    words = {
        "en": "A cold `python test.py --prompt ...` answers after {:.1f} s, {:.1f} of them to import torch.",
        "zh": "冷启动的 `python test.py --prompt ...` 在 {:.1f} 秒后给出第一个词元，其中导入 torch 用 {:.1f} 秒。",
    }[lang]
    return words.format(median["first_token"], median["torch"]) + "\n\n" + measured(results, lang)


BLOCKS: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (overview, demo, recipe, preprocess, train, decode, positions, speculation, first_token)
}


def filled(page: str, lang: str) -> str:
    """Return the text of a page with every block filled from the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    unknown = {name for _, name, _ in BLOCK.findall(text)} - BLOCKS.keys()
    if unknown:
        raise SystemExit(
            f"error: {page} asks for the results {', '.join(sorted(unknown))}: known are {', '.join(BLOCKS)}"
        )
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]](lang)}\n{match[3]}", text)


def main() -> int:
    differing = []
    for page, lang in PAGES.items():
        text = filled(page, lang)
        if text != (ROOT / page).read_text(encoding="utf-8"):
            differing.append(page)
            if "--check" not in sys.argv:
                (ROOT / page).write_text(text, encoding="utf-8")
    if "--check" in sys.argv and differing:
        print(f"error: {', '.join(differing)} differ from benchmarks/results: run python scripts/write_results.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
