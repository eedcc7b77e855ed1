"""Writes benchmarks/results/demo.json from what `bash run_demo.sh MODEL` left behind: nothing is copied by hand.

    python benchmarks/demo_results.py                       the models whose demo has run in output/; the others stay
    python benchmarks/demo_results.py ../clone/output       the output folder of another checkout

A row has the parameters, the held-out bits per character, the shares of the poems, the tokens that both trainings saw,
and the seconds of all stages (demo_times.json: the downloads and the Python environment included). The machine's fp32
matmul rate is measured now: run this alone, on the machine of the demo.
"""

import json
import os
import platform
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from demo import times  # noqa: E402
from engine.planning.mfu import measure_matmuls  # noqa: E402
from engine.runs.registry import load_run  # noqa: E402
from utils.atomic import write_text  # noqa: E402
from utils.errors import UserError, run_script  # noqa: E402
from utils.files import load_json  # noqa: E402

RESULT = ROOT / "benchmarks/results/demo.json"


def shares(counts: dict[str, Any]) -> dict[str, float]:
    """Return the shares of poems in form, of those that rhyme, and of copied verses; see demo/report.py."""
    return {
        "form": counts["in_form"] / counts["poems"],
        "rhyme": counts["rhyming"] / counts["poems"],
        "copied": counts["copied"] / counts["verses"],
    }


def row(result: dict[str, Any], output: Path) -> tuple[str, dict[str, Any]]:
    """Return the name of the model of a demo.json, and its figures."""
    model = load_run(output / Path(result["settings"]["run"]).name, device=torch.device("cpu")).model
    assert model.model_name is not None
    stages = times.read(output / "demo_times.json")
    counts = model.num_params()
    return model.model_name, {
        "parameters": counts["total"],
        "active": counts["active"],
        "bits_per_character": round(result["pretrain_bits_per_character"], 4),
        **{name: round(share, 4) for name, share in shares(result["model"]).items()},
        "tokens": sum(result["tokens"].values()),
        "seconds": sum(times.of(stages, model.model_name).values()),
    }


def cpu_name() -> str:
    """Return the name of the CPU and its number of cores."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Read the results of the demos in the folder that is the only argument."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "output")
    found = [load_json(path, "run the demo again") for path in sorted(output.glob("sft_*/demo.json"))]
    if not found:
        raise UserError(f"{output} has no result of a demo: run `bash run_demo.sh MODEL` first")
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["models"] if RESULT.exists() else {}
    written = {
        "date": date.today().isoformat(),
        "command": "bash run_demo.sh MODEL",
        "machine": cpu_name(),
        "fp32_gflops": round(measure_matmuls(torch.device("cpu"), "fp32") / 1e9),
        "models": kept | dict(row(result, output) for result in found),
        "references": {"real": shares(found[-1]["real_poems"]), "shuffled": shares(found[-1]["shuffled_poems"])},
    }
    write_text(RESULT, json.dumps(written, indent=1) + "\n")
    print(json.dumps(written, indent=1))


if __name__ == "__main__":
    run_script(main)
