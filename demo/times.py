"""Keeps how long the stages of the demo took: `python demo/times.py FILE KEY SECONDS` notes one, without KEY prints all."""

import json
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Note the seconds of one stage in the JSON file, or print the file as a table with its sum."""
    path = Path(argv[0])
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if len(argv) == 3:
        times[argv[1]] = int(argv[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
        return
    for stage, seconds in times.items():
        print(f"  {stage:<14} {seconds // 60:3d} min {seconds % 60:02d} s")
    total = sum(times.values())
    print(f"  {'all stages':<14} {total // 60:3d} min {total % 60:02d} s")


if __name__ == "__main__":
    main(sys.argv[1:])
