"""Runs checks over one architecture, and turns each outcome into one line: pass, fail or skip."""

import inspect
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checks import CHECKS, FAST, CheckFailed, ModelUnderTest, NotApplicable
from checks.harness.snapshot import restore_settings, settings
from model import BaseModel, get_model_and_args
from utils.errors import UserError

BUILDS = "contract.builds"  # the check that comes before all others: the file imports, and a tiny model runs
Check = Callable[[ModelUnderTest], None]
MODEL_FOLDER = Path(inspect.getfile(BaseModel)).parent


@dataclass
class Result:
    """The outcome of one check. status: "pass", "fail" or "skip"; detail: what was seen, or why it was left out."""

    check: str
    status: str
    detail: str = ""
    causes: list = field(default_factory=list)
    seconds: float = 0.0


def run_checks(
    tested: ModelUnderTest, names: Iterable[str] | None = None, report: Callable[[Result], object] = lambda result: None
) -> list[Result]:
    """Return the `Result` of each check in `names` (default: all), in order; `report` is called with each as it
    comes."""
    results = []
    for name in names or CHECKS:
        results.append(run_check(tested, name))
        if report is not None:
            report(results[-1])
    return results


def run_check(tested: ModelUnderTest, name: str) -> Result:
    """Run one check from a fixed seed, and return its `Result`."""
    started, check = time.perf_counter(), CHECKS[name]
    with _undisturbed():
        causes: list[str]
        try:
            check(tested)
            status, detail, causes = "pass", "", []
        except NotApplicable as reason:
            status, detail, causes = "skip", str(reason), []
        except CheckFailed as failure:
            status, detail, causes = "fail", str(failure), [*failure.causes, *usual_causes(check)]
        except Exception as error:
            status, detail, causes = "fail", crash_text(error, tested.Model), usual_causes(check)
    return Result(name, status, detail, causes, time.perf_counter() - started)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread (a second one slows tiny matrices down), a fixed seed, no warnings; all restored at the end."""
    before = settings()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        restore_settings(before)


def open_registered(name: str, switches: dict | None = None) -> tuple[ModelUnderTest | None, Result]:
    """Return (the model under test, Result of `contract.builds`): None when its file fails to import or to run.

    switches: argument values taken over from a real run. Raises `ModelError` when no model has that name.
    """
    try:
        Model, ModelArgs = get_model_and_args(name)
    except Exception as error:
        if str(error).startswith("unknown model"):
            raise
        return None, Result(BUILDS, "fail", import_text(str(error)))
    return open_classes(Model, ModelArgs, switches)


def open_classes(
    Model: type[BaseModel], ModelArgs: type, switches: dict | None = None
) -> tuple[ModelUnderTest | None, Result]:
    """The same for the classes of an architecture that is not registered."""
    started = time.perf_counter()
    with _undisturbed():
        try:
            tested, status, detail = ModelUnderTest.of(Model, ModelArgs, switches), "pass", ""
        except Exception as error:
            tested, status, detail = None, "fail", crash_text(error, Model)
    return tested, Result(BUILDS, status, detail, [], time.perf_counter() - started)


def first_sentence(check: Check) -> str:
    """Return what a check proves, in one line."""
    return (inspect.getdoc(check) or "").split("\n\n")[0].replace("\n", " ")


def usual_causes(check: Check) -> list[str]:
    """Return the causes that a check's docstring lists, in order."""
    found = re.search(r"Causes:(.*)", inspect.getdoc(check) or "", re.DOTALL)
    return [" ".join(cause.split()).rstrip(".") for cause in found[1].split(";")] if found else []


def crash_text(error: BaseException, Model: type) -> str:
    """Return where in the author's file an error arose: "model/mynet.py:41 in forward: RuntimeError: ..."."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    own = Path(inspect.getfile(Model))
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if Path(f.filename) == own), None)
    if frame is not None:
        return f"{_short(own)}:{frame.lineno} in {frame.name}: {message}"
    shared = next((f for f in reversed(frames) if Path(f.filename).parent == MODEL_FOLDER), None)
    inside = f", raised in {_short(shared.filename)}:{shared.lineno}" if shared else ""
    line = inspect.getsourcelines(Model)[1]
    return f"{_short(own)}:{line} in class {Model.__name__}: {message}{inside}"


def import_text(message: str) -> str:
    """Shorten discovery's report of an unusable file to one line with the file's own line."""
    first, *rest = message.strip().splitlines()
    lines = [re.search(r'File "(.*?)", line (\d+)', line) for line in rest]
    places = [(Path(m[1]), m[2]) for m in lines if m]
    file = first.split(" ")[0].rstrip(":")
    place = next((number for path, number in reversed(places) if path.name == Path(file).name), None)
    return f"{file}:{place}: {rest[-1].strip()}" if place else first


def _short(path: str | Path) -> str:
    path = Path(path)
    return f"{path.parent.name}/{path.name}"


def refuse_unless_right(name: str, switches: dict | None = None) -> None:
    """Run the fast checks on the architecture called `name`; `UserError` with the first failure when one fails."""
    tested, built = open_registered(name, switches)
    results = [built] if tested is None else run_checks(tested, FAST)
    failed = [r for r in results if r.status == "fail"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"{name} fails the check {failed[0].check}{more}: {failed[0].detail}: see python "
            f"check_model.py --model_name={name}, or train anyway with --skip_checks"
        )
