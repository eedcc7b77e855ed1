"""The directory of a run: which one a command means, its lock, and the small files that describe the run."""

import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import yaml
from filelock import FileLock, Timeout

from engine.distributed import process_group
from engine.runs.checkpoint import find_checkpoints, newest_checkpoint, verify_checkpoint
from model.basemodel import BaseModel
from utils.atomic import copy_file, write_text
from utils.config import load_yaml, to_dict
from utils.errors import UserError
from utils.files import load_json
from utils.log import log
from utils.tokenizer import Tokenizer
from utils.version import VERSION

Fingerprint = dict[str, Any]  # JSON values; see run_fingerprint


class RunSettings(Protocol):
    """The settings of a training that decide its run directory: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    output_path: str
    run_name: str
    model_name: str
    resume: str
    dry_run: bool
    write_run_path: str
    seed: int


@dataclass
class RunDirectory:
    """Where a run goes."""

    folder: Path
    checkpoint: Path | None = None  # the checkpoint to resume from
    same: bool = False  # whether a run of the same fingerprint has begun there, with or without a checkpoint
    summary: dict[str, Any] | None = None  # summary.json of a run that has finished


# ------------------------------------------------------------------------------------------ which directory it is


def run_fingerprint(config: Any, facts: dict[str, Any]) -> Fingerprint:
    """Return everything that affects the result of a run: its settings and the fingerprints of its inputs.

    config: a dataclass; its neutral fields do not affect the result and are left out. Two commands with the same
    fingerprint are the same run: the second resumes the first, or finds it finished. run.json has it as "identity".
    """
    decisive = {f.name for f in fields(config) if not f.metadata.get("neutral")}
    settings = {key: value for key, value in to_dict(config).items() if key in decisive}
    return json.loads(json.dumps({**settings, **facts}))


def choose_run_directory(config: RunSettings, stage: str, fingerprint: Fingerprint) -> RunDirectory:
    """Resolve --resume to a run directory on the main process, and broadcast it.

    A --dry_run does not look for an earlier run. UserError: --resume names nothing to resume from.
    """
    if config.dry_run:
        return RunDirectory(_first_directory(config, stage))
    chosen = error = None
    if process_group.is_main():
        try:
            chosen = _choose(config, stage, fingerprint)
        except UserError as caught:
            error = caught
    chosen, error = process_group.broadcast_object((chosen, error))
    if error is not None:
        raise error
    assert chosen is not None
    if config.write_run_path and process_group.is_main():
        file = Path(config.write_run_path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{chosen.folder}\n")
    return chosen


def _choose(config: RunSettings, stage: str, fingerprint: Fingerprint) -> RunDirectory:
    if config.resume not in ("auto", "never", "must"):
        return _explicit_resume(Path(config.resume), fingerprint)
    first = _first_directory(config, stage)
    same, reasons = (None, []) if config.resume == "never" else _find_same_run(first, fingerprint, config.resume)
    if same is not None:
        return same
    if config.resume == "must":
        found = "; ".join(reasons) or f"{first} does not exist"
        raise UserError(f"--resume=must, but there is no run to resume: {found}")
    folder = _find_vacant(first)
    for reason in reasons:
        log(f"{reason}: this run goes to {folder}")
    return RunDirectory(folder)


def _explicit_resume(folder: Path, fingerprint: Fingerprint) -> RunDirectory:
    """The run that --resume=PATH names; UserError when this command cannot resume it."""
    if not (folder / "run.json").is_file():
        raise UserError(f"--resume={folder}: that is no run folder; use auto, never, must or the path of one")
    other = _read_fingerprint(folder)
    if other.get("stage") != fingerprint["stage"]:
        raise UserError(
            f"--resume={folder}: that run is of the stage {other.get('stage')}, not {fingerprint['stage']}; "
            "--resume takes a run of the same script"
        )
    if other.get("tokenizer") != fingerprint["tokenizer"]:
        raise UserError(f"--resume={folder}: that run has another tokenizer; give the same --tokenizer_path")
    if other.get("model") != fingerprint["model"]:
        raise UserError(f"--resume={folder}: that run has another architecture; give the same --model.* fields")
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"--resume={folder}: no valid checkpoint there to resume from")
    return RunDirectory(folder, checkpoint, same=other == fingerprint)


def _find_same_run(first: Path, fingerprint: Fingerprint, resume: str) -> tuple[RunDirectory | None, list[str]]:
    """Return (the run with this fingerprint, or None; in what each other run differs)."""
    differences = []
    for folder in _numbered(first):
        if _is_vacant(folder) or not (folder / "run.json").is_file():
            continue
        other = _read_fingerprint(folder)
        if other != fingerprint:
            keys = [key for key in fingerprint if other.get(key) != fingerprint[key]]
            differences.append(f"{folder} differs in {', '.join(keys[:4])}")
            continue
        summary = _finished_summary(folder)
        if summary is not None:
            return RunDirectory(folder, summary=summary), differences
        checkpoint = newest_checkpoint(folder)
        if checkpoint is not None or resume != "must":
            return RunDirectory(folder, checkpoint, same=True), differences
    return None, differences


def _finished_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None also when the process died just before it was written."""
    if not (folder / "final").is_dir() or verify_checkpoint(folder / "final") is not None:
        return None
    try:
        return load_json(folder / "summary.json", "")
    except UserError:
        return None


def _find_vacant(first: Path) -> Path:
    """The first numbered directory that an interrupted start left empty, else the first that does not exist."""
    last = first
    for number, folder in enumerate(_numbered(first), start=2):
        if _is_vacant(folder):
            return folder
        last = first.with_name(f"{first.name}_{number}")
    return last


def _first_directory(config: RunSettings, stage: str) -> Path:
    return Path(config.output_path) / (config.run_name or f"{stage}_{config.model_name}")


def _numbered(first: Path) -> Iterator[Path]:
    """The directories name, name_2, name_3, ... that exist."""
    number = 1
    folder = first
    while folder.exists():
        yield folder
        number += 1
        folder = first.with_name(f"{first.name}_{number}")


def _read_fingerprint(folder: Path) -> Fingerprint:
    try:
        fingerprint = load_json(folder / "run.json", "").get("identity")
    except UserError:
        return {}
    return fingerprint if isinstance(fingerprint, dict) else {}


# ---------------------------------------------------------------------------------------- empty and locked directories


def is_empty(folder: Path) -> bool:
    """Whether a run directory has neither a checkpoint nor a record of a step; False for a directory of others."""
    metrics = folder / "metrics.jsonl"
    return (
        folder.is_dir()
        and ((folder / ".lock").is_file() or not any(folder.iterdir()))
        and not (folder / "final").exists()
        and not find_checkpoints(folder)
        and not (metrics.is_file() and metrics.stat().st_size)
    )


@contextmanager
def remove_if_empty_on_error(folder: Path) -> Iterator[None]:
    """Delete the run directory when the block fails before the first step."""
    try:
        yield
    except BaseException:
        if process_group.is_main() and is_empty(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def lock_folder(folder: Path) -> ExitStack:
    """Lock a run directory for this process until the returned stack is closed, or the process dies.

    UserError when another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stack = ExitStack()
    try:
        stack.enter_context(FileLock(folder / ".lock", timeout=0, thread_local=False))
    except Timeout:
        raise UserError(
            f"another process is training in {folder}: wait for it, or start with --resume=never or another --run_name"
        ) from None
    return stack


def _is_vacant(folder: Path) -> bool:
    """Whether a start was interrupted before its first step, so that another run may take the directory."""
    if not is_empty(folder):
        return False
    try:
        lock_folder(folder).close()
    except UserError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ files of a run


def write_run_files(
    folder: Path,
    config: RunSettings,
    stage: str,
    fingerprint: Fingerprint,
    model: BaseModel,
    tokenizer: Tokenizer,
    model_source: Path,
) -> None:
    """Write config.yaml, run.json, a copy of the model's file and the tokenizer: what later stages need."""
    settings = {"stage": stage, **to_dict(config), "model": fingerprint["model"]}
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    about = {
        "version": VERSION,
        "stage": stage,
        "model_name": config.model_name,
        "params": model.num_params(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "seed": config.seed,
        "processes": process_group.world_size(),
        "device": str(next(model.parameters()).device),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()},
        "git_revision": git_revision(),
        "identity": fingerprint,
    }
    write_text(folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False))
    copy_file(model_source, folder / model_source.name)
    tokenizer.save(folder / "tokenizer")


def resolved(folder: Path, name: str) -> int:
    """An integer setting of the run in `folder`, as it was resolved; 0 when it is not in its config.yaml."""
    value = load_yaml(folder / "config.yaml").get(name)
    return value if isinstance(value, int) else 0


def precision_of(folder: Path) -> str:
    """The precision that the run in `folder` computes in; "auto" when its config.yaml leaves it open."""
    return str(load_yaml(folder / "config.yaml").get("precision", "auto"))


def source_fingerprint(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def git_revision() -> str | None:
    """The commit of the code, with a + when tracked files have changed since; None outside a git checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
