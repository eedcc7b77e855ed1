"""Speed and memory of preprocessing, from jsonl to token files.

    python benchmarks/preprocess.py                   both parts: about 12 minutes on two CPU cores
    python benchmarks/preprocess.py --parts=speed     one of them: the results of the other are kept

speed: the poems as jsonl to .bin + .docs.npy + .meta.json, from process start to end, all contenders in each round; the
median is reported. Ours, with the fast encoder and with the reference, is compared with two short scripts that do not
clean, split, verify or hash: one encodes batches with `encode_batch_fast` on all cores, the other line by line. Ours
includes the data report. CPU seconds, user and system, of all processes of a run are reported too: other work on the
machine affects them less.
memory: the maximum of the resident memory of all processes of a run, sampled every 20 ms, on the poems and on a corpus
of --large_gb derived from them, which is deleted afterwards.
Writes benchmarks/results/preprocess.json and prints the tables.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from preprocess_data.corpora.poems import document  # noqa: E402
from preprocess_data.pipeline.workers import available_cores  # noqa: E402
from utils.atomic import write_text  # noqa: E402
from utils.config import opt, parse  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402

OURS = "ours"
REFERENCE = "ours, --encoder=tokenizers"
BATCHES = "encode_batch_fast"
LINES = "line by line"
LIBRARIES = ("tokenizers", "gigatoken", "orjson", "numpy")
PLAIN = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
source, path, out, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
tokenizer = Tokenizer.from_file(path + "/tokenizer.json")
tokenizer.encode_special_tokens = True
bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
starts, tokens = [], 0
def write(texts, file):
    global tokens
    if size > 1:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    else:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for one in encoded:
        ids = [bos, *one.ids, eos]
        np.array(ids, np.uint16).tofile(file)
        starts.append(tokens)
        tokens += len(ids)
with open(source, encoding="utf-8") as lines, open(out + ".bin", "wb") as file:
    batch = []
    for line in lines:
        batch.append(json.loads(line)["text"])
        if len(batch) == size:
            write(batch, file)
            batch = []
    if batch:
        write(batch, file)
np.save(out + ".docs.npy", np.array(starts, np.uint64))
json.dump({"tokens": tokens, "documents": len(starts)}, open(out + ".meta.json", "w"))
"""


@dataclass
class Config:
    __doc__ = __doc__
    corpus: str = opt("output/corpora/poems.jsonl", "what preprocess_data.py fetch poems writes", path=True)
    tokenizer_path: str = opt("output/tokenizer", "folder of the tokenizer", path=True)
    parts: list[str] = opt(["speed", "memory"], "speed, memory")
    lines: int = opt(0, "number of poems for the speed; 0: all")
    rounds: int = opt(5, "runs of each contender")
    large_gb: float = opt(2.0, "GB of the large corpus")
    results: str = opt(str(ROOT / "benchmarks/results/preprocess.json"), "file to write")


def make_corpus(poems: Path, out: Path, size: float = 0) -> None:
    """The poems as jsonl {"text"}, repeated up to `size` bytes with other Chinese characters."""
    with open(poems, encoding="utf-8") as lines:
        records = [json.dumps({"text": document(json.loads(line))}, ensure_ascii=False) + "\n" for line in lines]
    codes = np.frombuffer("".join(records).encode("utf-32-le"), "<u4")
    common = np.flatnonzero(np.bincount(codes)[:0x9FA6])
    common = common[common >= 0x4E00]
    mapping = np.arange(codes.max() + 1, dtype="<u4")
    shift = 0
    with open(out, "wb") as file:
        while file.tell() < size or not shift:
            mapping[common] = np.roll(common, shift)
            file.write(mapping[codes].tobytes().decode("utf-32-le").encode())
            shift += 7


def command(contender: str, source: Path, tokenizer_path: str, out: Path) -> list[str]:
    if contender in (BATCHES, LINES):
        size = "1000" if contender == BATCHES else "1"
        return [sys.executable, "-c", PLAIN, str(source), tokenizer_path, str(out / "plain"), size]
    ours = [sys.executable, str(ROOT / "preprocess_data/preprocess_data.py"), "pretrain", f"--sources={source}"]
    ours += [f"--tokenizer_path={tokenizer_path}", f"--data_path={out}"]
    return [*ours, "--encoder=tokenizers"] if contender == REFERENCE else ours


def run(contender: str, source: Path, tokenizer_path: str, watch: bool = False) -> dict:
    """One run: seconds, tokens, the chosen encoder, and with `watch` the peak memory in MB."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        start = time.perf_counter()
        peak = 0
        argv = command(contender, source, tokenizer_path, Path(out))
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while watch and (now := resident(process.pid)):
            peak = max(peak, now)
            time.sleep(0.02)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise UserError(f"{contender} failed: {output.strip().splitlines()[-1]}")
        metas = [json.loads(path.read_text()) for path in Path(out).glob("*.meta.json")]
    tokens, documents = (sum(meta[key] for meta in metas) for key in ("tokens", "documents"))
    return {
        "seconds": seconds,
        "core_seconds": used.ru_utime + used.ru_stime,
        "tokens": tokens,
        "documents": documents,
        "encoder": metas[0].get("encoder", ""),
        **({"peak_mb": peak / 1e6} if watch else {}),
    }


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and its descendants, summed; shared memory counts twice."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # the process has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def speed(source: Path, config: Config) -> dict:
    contenders = (OURS, BATCHES, REFERENCE, LINES)
    if config.lines:
        full = source
        source = source.with_name("part.jsonl")
        with open(full, "rb") as lines, open(source, "wb") as part:
            part.writelines(itertools.islice(lines, config.lines))
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    megabytes = source.stat().st_size / 1e6
    for number in range(config.rounds):
        for name in contenders:
            runs[name].append(run(name, source, config.tokenizer_path))
            last = runs[name][-1]
            print(
                f"round {number + 1}: {name} {last['seconds']:.1f} s, {last['core_seconds']:.1f} CPU seconds",
                flush=True,
            )
    median = {name: statistics.median(found["seconds"] for found in runs[name]) for name in contenders}
    rows = {
        name: {
            "seconds": [round(found["seconds"], 2) for found in runs[name]],
            "core_seconds": [round(found["core_seconds"], 2) for found in runs[name]],
            "mb_per_second": round(megabytes / median[name], 2),
            "times_line_by_line": round(median[LINES] / median[name], 2),
            "times_encode_batch_fast": round(median[BATCHES] / median[name], 2),
            **{key: runs[name][0][key] for key in ("tokens", "documents", "encoder")},
        }
        for name in contenders
    }
    print("\n| | MB/s | against line by line | against `encode_batch_fast` |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        ratios = f"{row['times_line_by_line']:.1f}x | {row['times_encode_batch_fast']:.1f}x"
        print(f"| {name} | {row['mb_per_second']:.1f} | {ratios} |")
    return {"megabytes": round(megabytes, 1), "contenders": rows}


def memory(source: Path, config: Config) -> dict:
    rows = {}
    large = source.with_name("large.jsonl")
    make_corpus(Path(config.corpus), large, config.large_gb * 1e9)
    for path in (source, large):
        found = run(OURS, path, config.tokenizer_path, watch=True)
        megabytes = path.stat().st_size / 1e6
        rows[f"{megabytes:.0f} MB"] = {
            "peak_mb": round(found["peak_mb"]),
            "seconds": round(found["seconds"], 1),
            "mb_per_second": round(megabytes / found["seconds"], 1),
            "tokens": found["tokens"],
        }
        print(f"{megabytes:.0f} MB: peak {found['peak_mb']:.0f} MB, {found['seconds']:.1f} s", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv)
    if not Path(config.corpus).is_file():
        raise UserError(f"no poems in {config.corpus}: run python preprocess_data/preprocess_data.py fetch poems")
    path = Path(config.results)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="preprocess_benchmark_") as folder:
        source = Path(folder) / "poems.jsonl"
        make_corpus(Path(config.corpus), source)
        for part, measure in (("memory", memory), ("speed", speed)):
            if part in config.parts:
                results[part] = {
                    "date": time.strftime("%Y-%m-%d"),
                    "command": f"python benchmarks/preprocess.py --parts={part}",
                    "rounds": config.rounds,
                    "lines": config.lines,
                    "machine": f"{available_cores()} cores, {platform.machine()}, {platform.system()}",
                    "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
                    **measure(source, config),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
