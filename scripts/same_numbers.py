"""Does this tree give the same numbers as another revision? python scripts/same_numbers.py REV

Runs the same commands in this working tree and in a temporary worktree of REV, on this machine, and compares to the
bit: the tokenizer, token files, 50 steps of every CPU preset that both have (fp32 eager and bf16 compiled: losses,
gradient norms, every other metric, final weights), fine-tuning, greedy and sampled text, and an export for
transformers. A refactor is done when this ends with "equal". It takes about 15 minutes on two cores with AVX512-BF16;
without it --bf16_options="--max_batch_size=1 --max_seq_len=64" makes the steps smaller. --keep leaves the
results of both trees for a closer look.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MODES = {
    "fp32": ["--precision=fp32", "--compile=false"],
    "fp32_compiled": ["--precision=fp32", "--compile=true"],
    "bf16": ["--precision=bf16", "--compile=true"],
}
CHATS = {
    "greedy": ["--temperature=0"],
    "sampled": ["--temperature=1.0", "--top_p=0.9", "--seed=7"],
    "int8": ["--temperature=0", "--precision=int8"],
}
PROMPT = "请以《春夜》为题，写一首五言绝句。"
MEASURED = {"tokens_per_s", "mfu", "seconds", "memory", "gb"}  # metrics of the machine, not of the training


class Tree:
    """One of the two trees, its results folder, and what it found: {name: value to compare}."""

    def __init__(self, name: str, root: Path, out: Path, corpora: Path) -> None:
        self.name = name
        self.root = root
        self.out = out
        self.corpora = corpora
        self.found: dict[str, object] = {}

    def run(self, *arguments: object) -> str:
        """Run a script of this tree and return its standard output; stop with its messages when it fails."""
        command = [sys.executable, *map(str, arguments)]
        compiled = str(self.out / "compiled")  # a cache of its own: neither tree runs what another program compiled
        environment = os.environ | {"PYTHONUTF8": "1", "TORCHINDUCTOR_CACHE_DIR": compiled}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {self.name}: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def tokenizer_and_tokens(self) -> None:
        tokenizer = f"--tokenizer_path={self.out / 'tokenizer'}"
        corpora = f"--corpora_path={self.corpora}"
        data = f"--data_path={self.out / 'data'}"
        small = ["--vocab_size=5120", "--split_han", "--max_characters=1000000"]
        self.run("train_tokenizer.py", "--sources=idioms,poems", corpora, tokenizer, *small)
        prepare = ["preprocess_data/preprocess_data.py"]
        self.run(*prepare, "pretrain", "--sources=poems,idioms", corpora, tokenizer, data, "--max_documents=6000")
        self.run(*prepare, "sft", "--sources=demo-chat", corpora, tokenizer, data, "--max_documents=2000")
        self.found["tokenizer"] = hashes([self.out / "tokenizer/tokenizer.json"])
        self.found["tokens"] = hashes(sorted([*self.out.glob("data/*.bin"), *self.out.glob("data/*.npy")]))

    def train(self, model: str, mode: str, steps: int, further: list[str]) -> Path:
        """Pretrain, with `further` options, and fine-tune in fp32; return the run to talk to."""
        common = [
            f"--tokenizer_path={self.out / 'tokenizer'}",
            f"--output_path={self.out / mode}",
            "--device=cpu",
            "--log_interval=1",
            "--eval_final_batches=2",
            *MODES[mode],
        ]
        tokens = f"--pretrain_data_path={self.out / 'data/pretrain_train.bin'}"
        preset = f"--config=configs/{model}_cpu.yaml"
        self.run("pretrain.py", preset, f"--model_name={model}", tokens, f"--max_steps={steps}", *common, *further)
        run = self.out / mode / f"pretrain_{model}"
        self.found |= training_results(f"{model} {mode} pretraining", run)
        if mode == "fp32":
            tokens = f"--sft_data_path={self.out / 'data/sft_train.bin'}"
            few = f"--max_steps={max(2, steps // 5)}"
            self.run("sft.py", "--config=configs/sft_cpu.yaml", f"--init_from={run}", tokens, few, *common)
            run = self.out / mode / f"sft_{model}"
            self.found |= training_results(f"{model} {mode} fine-tuning", run)
        return run

    def talk_and_export(self, model: str, run: Path) -> None:
        for name, settings in CHATS.items():
            answer = self.run("test.py", f"--run={run}", f"--prompt={PROMPT}", "--max_new_tokens=60", *settings)
            self.found[f"{model} {name} text"] = answer
        folder = self.out / f"exported_{model}"
        self.run("export.py", "--run", run, "--to", "hf", folder)
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".jinja"})
        self.found[f"{model} export"] = hashes(files)


def hashes(paths: list[Path]) -> dict[str, str]:
    """Return {file name: sha256}."""
    if not paths:
        raise SystemExit("error: a stage left no files to compare")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def training_results(what: str, run: Path) -> dict[str, object]:
    """Return the metrics of every step and the hash of the final weights of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        for name in MEASURED & record.keys():
            del record[name]
    return {f"{what}: metrics": records, f"{what}: weights": hashes([run / "final/model.safetensors"])}


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """Check `revision` out into `folder` for the time of the block."""
    git = ["git", "-C", str(ROOT), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), revision], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git cannot check out {revision}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(trees: list[Tree]) -> int:
    """Print a line for each finding and return how many differ."""
    ours, theirs = trees
    differing = 0
    for name in ours.found:
        equal = ours.found[name] == theirs.found.get(name)
        differing += not equal
        print(
            f"{'equal ' if equal else 'DIFFERS'} {name}{'' if equal else ': ' + first_difference(ours, theirs, name)}"
        )
    return differing


def first_difference(ours: Tree, theirs: Tree, name: str) -> str:
    """Describe in one line the first difference of two findings."""
    a = ours.found[name]
    b = theirs.found.get(name)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} records, {len(b)} in the other revision"
        step, (here, there) = next((i, pair) for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        return f"record {step}: {', '.join(f'{key} {here.get(key)} and {there.get(key)}' for key in keys)}"
    if isinstance(a, dict) and isinstance(b, dict):
        return ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))
    return f"{a!r} and {b!r}"


def presets(roots: list[Path]) -> list[str]:
    """Return the models that have a CPU preset in every tree."""
    names = [{path.name.removesuffix("_cpu.yaml") for path in root.glob("configs/mini_*_cpu.yaml")} for root in roots]
    return sorted(set.intersection(*names))


def ensure_corpora(folder: Path) -> None:
    """Fetch the small corpora that are not there yet."""
    for name in ("poems", "idioms", "demo-chat"):
        if not (folder / f"{name}.jsonl").is_file():
            fetch = ["preprocess_data/preprocess_data.py", "fetch", name, f"--corpora_path={folder}"]
            subprocess.run([sys.executable, *fetch], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the revision to compare with, as git names it")
    parser.add_argument("--steps", type=int, default=50, help="pretraining steps of each preset (default: 50)")
    parser.add_argument("--bf16_options", default="", help="further options of pretraining in bf16, in one string")
    parser.add_argument("--modes", default="bf16,fp32", help=f"of {', '.join(MODES)} (default: bf16,fp32)")
    parser.add_argument("--models", default="", help="models to compare, separated by commas (default: all presets)")
    parser.add_argument("--corpora_path", default=str(ROOT / "output/corpora"), help="folder of the small corpora")
    parser.add_argument("--keep", default="", help="folder that keeps the results of both trees")
    arguments = parser.parse_args()
    corpora = Path(arguments.corpora_path).resolve()
    ensure_corpora(corpora)
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="same_numbers_"))
    out = Path(arguments.keep).resolve() if arguments.keep else scratch
    try:
        with worktree(arguments.revision, scratch / "tree") as other:
            trees = [
                Tree("this tree", ROOT, out / "this", corpora),
                Tree(arguments.revision, other, out / "other", corpora),
            ]
            models = [name for name in arguments.models.split(",") if name] or presets([ROOT, other])

            def both(what: str, stage: str, *details: object) -> list:
                results = []
                for tree in trees:
                    print(f"[{time.monotonic() - started:4.0f} s] {tree.name}: {what}", flush=True)
                    results.append(getattr(tree, stage)(*details))
                return results

            both("tokenizer and tokens", "tokenizer_and_tokens")
            for model in models:
                for mode in [*dict.fromkeys(arguments.modes.split(","))]:
                    further = arguments.bf16_options.split() if mode == "bf16" else []
                    runs = both(" ".join([model, mode, *further]), "train", model, mode, arguments.steps, further)
                for tree, run in zip(trees, runs, strict=True):
                    print(f"[{time.monotonic() - started:4.0f} s] {tree.name}: {model} text and export", flush=True)
                    tree.talk_and_export(model, run)
        differing = compare(trees)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if differing:
        print(f"{differing} of {len(trees[0].found)} differ from {arguments.revision}")
        return 1
    print(f"equal: {len(trees[0].found)} findings, {', '.join(models)}, {arguments.steps} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
