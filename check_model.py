"""Is an architecture file right? Every check over a tiny model of it, one line each.

python check_model.py --model_name=MODEL
python check_model.py --model_name=MODEL --only=causality,state.long_sequences --json=checks.json
"""

import difflib
import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from checks import CHECKS, ModelUnderTest
from checks.harness.runner import BUILDS, Result, first_sentence, open_registered, run_checks
from model import get_model_and_args, list_models
from utils.atomic import atomic_write
from utils.config import opt, parse
from utils.errors import UserError, run_script

RENAMED = {
    "rows": "batch",
    "norms_a_layer": "norms_per_layer",
    "rows_at_their_own_positions": "sequences_at_their_own_positions",
    "rows_can_be_reordered": "sequences_can_be_reordered",
}
MARKS = {"pass": "pass", "fail": "FAIL", "skip": "not applicable"}


@dataclass
class CheckConfig:
    """Proves an architecture right, or shows where it is wrong. Ends with 0 when no check fails, else with 1."""

    model_name: str = opt("", "architecture: the name of a file's model in model/")
    only: str = opt("", "checks or groups to run, separated by commas")
    json: str = opt("", "file for the results: a list of check, status (pass, fail, skip) and detail")
    list: bool = opt(False, "list the checks and what they prove")


def main(argv: list[str] | None = None) -> None:
    config = parse(CheckConfig, argv)
    if config.list:
        for name in CHECKS:
            print(f"{name}\n    {first_sentence(CHECKS[name])}")
        return
    if not config.model_name:
        raise UserError(f"which model? add --model_name=... (there are {', '.join(list_models())})")
    names, started = chosen(config.only), time.perf_counter()
    tested, built = open_registered(config.model_name)
    width = max(map(len, [*names, BUILDS]))
    show(built, width)
    results = [built]
    if tested is not None:
        print(describe(tested), flush=True)
        results += run_checks(tested, names, lambda result: show(result, width))
    if config.json:
        keys = ("check", "status", "detail")
        records = [{key: asdict(result)[key] for key in keys} for result in results]
        with atomic_write(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    count = {status: sum(r.status == status for r in results) for status in MARKS}
    print(
        f"{config.model_name}: {count['pass']} passed, {count['fail']} failed, {count['skip']} not applicable, "
        f"{time.perf_counter() - started:.1f} s"
    )
    if count["fail"]:
        raise SystemExit(1)


def chosen(only: str) -> list[str]:
    """Return the checks that --only names, by full name, group, or last part of the name; all without it."""
    if not only:
        return list(CHECKS)
    names = []
    for word in (w.strip() for w in only.split(",")):
        found = [n for n in CHECKS if word in (n, n.split(".")[0], n.split(".")[1])]
        if not found and word != BUILDS:
            group_or_name = [part for part in word.split(".") if part in RENAMED]
            if group_or_name:
                new = ".".join(RENAMED.get(part, part) for part in word.split("."))
                raise UserError(f"the check {word!r} is called {new} now: --only={new}")
            known = [*CHECKS, *dict.fromkeys(n.split(".")[0] for n in CHECKS)]
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
            raise UserError(f"unknown check {word!r}: " + (f"did you mean {near[0]}?" if near else "see --list"))
        names += found
    return [n for n in CHECKS if n in names]


def describe(tested: ModelUnderTest) -> str:
    """Return one line about the tiny model, and the warning when something could not be made small."""
    default = get_model_and_args(tested.name)[1]()
    changed = [f"{k}={v}" for k, v in vars(tested.args).items() if v != getattr(default, k, None)]
    total = tested.build().num_params()["total"]
    text = f"{total:,} parameters: {' '.join(changed)}"
    lines = textwrap.wrap(text, 108, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, *([f"  note: {tested.warning}"] if tested.warning else [])])


def show(result: Result, width: int) -> None:
    """Print one line, and for a failure what was seen and the likely causes in order."""
    wide = f"{result.check:<{width}}  {MARKS[result.status]}"
    print(f"{wide}  ({result.detail})" if result.status == "skip" and result.detail else wide, flush=True)
    if result.status == "fail":
        for line in textwrap.wrap(result.detail, 108):
            print(f"    {line}")
        for number, cause in enumerate(result.causes, 1):
            label = "    likely: " if number == 1 else "            "
            print("\n".join(textwrap.wrap(f"{number}. {cause}", 108, initial_indent=label, subsequent_indent=" " * 15)))


if __name__ == "__main__":
    run_script(main)
