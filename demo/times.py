"""Records how long the stages of the demo took, in a JSON file.

`python demo/times.py FILE STAGE SECONDS [MODEL]` records one; `python demo/times.py FILE MODEL` prints those of a
model, with the stages that all models share.
"""

import json
import sys
from pathlib import Path


def record(path: Path, stage: str, seconds: int, model: str = "") -> None:
    """Write the time of one stage into the file; it replaces an earlier one."""
    times = read(path)
    times[f"{stage} {model}".strip()] = seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, int]:
    """Return the seconds of each stage, keyed by `stage` or `stage model`."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def of(times: dict[str, int], model: str) -> dict[str, int]:
    """Return the seconds of the stages that led to this model, by stage."""
    return {key.split()[0]: seconds for key, seconds in times.items() if key.split()[1:] in ([], [model])}


def table(times: dict[str, int], model: str) -> str:
    """Return the stages that led to this model with their times and the sum."""
    shown = of(times, model)
    shown["all stages"] = sum(shown.values())
    return "\n".join(f"  {stage:<14} {seconds // 60:3d} min {seconds % 60:02d} s" for stage, seconds in shown.items())


if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    if len(arguments) == 1:
        print(table(read(Path(file)), arguments[0]))
    else:
        record(Path(file), arguments[0], int(arguments[1]), *arguments[2:])
