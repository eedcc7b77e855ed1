"""The folder of a run: which one this command means, and the small files that say what the run is."""

import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None

from engine.distributed import process_group
from engine.runs.checkpoint import damage, find_checkpoints, newest_checkpoint
from utils.atomic import copy_file, write_text
from utils.config import load_yaml, to_dict
from utils.errors import UserError
from utils.json_object import load_json
from utils.log import log


@dataclass
class Place:
    """Where the run goes: its folder, the checkpoint to go on from, and its summary when it is finished already."""

    folder: Path
    checkpoint: Path | None = None
    summary: dict | None = None


def identity(config, facts: dict) -> dict:
    """Everything that decides the numbers of a run: settings that are not neutral, and fingerprints of the inputs.

    Two commands with the same identity are the same run: the second goes on with the first, or finds it finished.
    """
    decisive = {f.name for f in fields(config) if not f.metadata.get("neutral")}
    settings = {key: value for key, value in to_dict(config).items() if key in decisive}
    return json.loads(json.dumps({**settings, **facts}))


def choose_place(config, stage: str, who: dict) -> Place:
    """Resolve --resume to a folder (the main process decides, the others hear of it); a --dry_run looks for nothing."""
    if config.dry_run:
        return Place(Path(config.output_path) / (config.run_name or f"{stage}_{config.model_name}"))
    place = error = None
    if process_group.is_main():
        try:
            place = _choose(config, stage, who)
        except UserError as caught:
            error = caught
    place, error = process_group.broadcast_object((place, error))
    if error is not None:
        raise error
    if config.write_run_path and process_group.is_main():
        file = Path(config.write_run_path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{place.folder}\n")
    return place


def _choose(config, stage: str, who: dict) -> Place:
    first = Path(config.output_path) / (config.run_name or f"{stage}_{config.model_name}")
    if config.resume not in ("auto", "never", "must"):
        folder = Path(config.resume)
        if not (folder / "run.json").is_file():
            raise UserError(f"--resume={folder}: that is no run folder; use auto, never, must or the path of one")
        theirs = _identity_of(folder)
        if theirs.get("stage") != who["stage"]:
            raise UserError(
                f"--resume={folder}: that run is of the stage {theirs.get('stage')}, not {who['stage']}; "
                "--resume goes on with a run of the same script"
            )
        if theirs.get("tokenizer") != who["tokenizer"]:
            raise UserError(f"--resume={folder}: that run has another tokenizer; give the same --tokenizer_path")
        if theirs.get("model") != who["model"]:
            raise UserError(f"--resume={folder}: that run has another architecture; give the same --model.* fields")
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            raise UserError(f"--resume={folder}: no valid checkpoint there to go on from")
        return Place(folder, checkpoint)

    reasons, vacant = [], None
    for folder in _numbered(first):
        if is_empty(folder) and not _is_locked(folder):  # a start that was cut short before its first step
            vacant = vacant or folder
            continue
        if config.resume == "never" or not (folder / "run.json").is_file():
            continue
        theirs = _identity_of(folder)
        if theirs == who:
            if (folder / "final").is_dir() and damage(folder / "final") is None:
                try:
                    return Place(folder, summary=load_json(folder / "summary.json", ""))
                except UserError:  # it died just before its summary, which is written again
                    pass
            checkpoint = newest_checkpoint(folder)
            if checkpoint is not None or config.resume != "must":
                return Place(folder, checkpoint)
        else:
            differ = [key for key in who if theirs.get(key) != who[key]]
            reasons.append(f"{folder} differs in {', '.join(differ[:4])}")
    if config.resume == "must":
        raise UserError(
            "--resume=must, but there is no run to go on with: " + ("; ".join(reasons) or f"{first} does not exist")
        )
    folder = vacant or next(f for f in _numbered(first, free=True))
    for reason in reasons:
        log(f"{reason}: this run goes to {folder}")
    return Place(folder)


def _numbered(first: Path, free: bool = False):
    """The folders name, name_2, name_3 ... that exist, or (free) the first that does not."""
    number, folder = 1, first
    while folder.exists():
        if not free:
            yield folder
        number += 1
        folder = first.with_name(f"{first.name}_{number}")
    if free:
        yield folder


def _identity_of(folder: Path) -> dict:
    try:
        who = load_json(folder / "run.json", "").get("identity")
    except UserError:
        who = None
    return who if isinstance(who, dict) else {}


def is_empty(folder: Path) -> bool:
    """Whether a run folder, made by a training or just made, holds neither a checkpoint nor a single step's record."""
    metrics = folder / "metrics.jsonl"
    return (
        folder.is_dir()
        and ((folder / ".lock").is_file() or not any(folder.iterdir()))
        and not (folder / "final").exists()
        and not find_checkpoints(folder)
        and not (metrics.is_file() and metrics.stat().st_size)
    )


@contextmanager
def leave_no_empty(folder: Path):
    """Within the block an error that comes before the first step takes the run folder with it."""
    try:
        yield
    except BaseException:
        if process_group.is_main() and is_empty(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_locked(folder: Path) -> bool:
    try:
        lock_folder(folder).close()
        return False
    except UserError:
        return True


def lock_folder(folder: Path):
    """Claim a run folder for this process; the claim ends when the returned file is closed or the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"another process is training in {folder}: wait for it, or start with --resume=never or "
                "another --run_name"
            ) from None
    return file


def write_run_files(folder: Path, config, stage: str, who: dict, model, tokenizer, model_source: Path) -> None:
    """config.yaml, run.json, the model's file as it is now, and the tokenizer: all that later stages need."""
    settings = {"stage": stage, **to_dict(config), "model": who["model"]}
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    about = {
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
        "identity": who,
    }
    write_text(folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False))
    copy_file(model_source, folder / model_source.name)
    tokenizer.save(folder / "tokenizer")


def micro_batch_of(folder: Path) -> int:
    """Rows of a micro-batch as the run in `folder` had them; 0 when its config.yaml does not say."""
    rows = load_yaml(folder / "config.yaml").get("max_batch_size")
    return rows if isinstance(rows, int) else 0


def source_fingerprint(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def git_revision() -> str | None:
    """The commit of the code, with a + when tracked files have changed since; None outside a git checkout."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
