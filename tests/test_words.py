"""Words of this project's own that have a standard term must not come back."""

import re

import pytest

from tests.support.paths import ROOT, name_of, source_files

UNIT = r"(?:row|sequence|token|step|nat|bit|second|byte|megabyte|flop|character|example|weight)s?"
WHOLE = r"(?:step|row|token|second|layer|character|model|prompt|run|file|process|sequence|expert|parameter)s?"

# {what to write instead: a regular expression, which ignores case}. There is no list of exceptions.
OLD_WORDS = {
    "per": rf"\b{UNIT} an? {WHOLE}\b(?! (?:holds|takes)\b)",
    "any, each": r"\b(?:whoever|nobody|anybody)\b",
    "again": r"\banew\b",
    "compute, estimate": r"\breckon",
    "fix": r"\bmend(?:s|ed|ing)?\b",
    "recently": r"\bof late\b",
    "non-finite": r"\bno numbers?\b(?! of\b)",
    "chat runs, ChatModel": r"talkers|speaker",
    "logged, reported, described": r"\btold\b|(?<!\.)\btells?\b",
    "next to, against, with": r"\bbeside\b",
    "mutant": r"\bplanted\b",
    "is, occurs": r"\bstood\b|\bstands\b",
    "output, message": r"\bsaid\b",
    "name it": r"\bno such thing\b|\bthings\b",
    "full, complete": r"\bwhole (?:batch|step|model|run|prompt|file|text|sequence|graph|process|corpus)\b",
    "sequences": r"\b(?:training|packed|packing) rows\b|\brows (?:a|per|of a) (?:step|batch|sequence)\b",
    "middleware": r"\bdoors?\b",
    "segments": r"\bstretches\b|\b(?:a|one) stretch\b",
    "MoE": r"\bmixtures?\b(?! of)|\bMixtureModel",
    "CPU": r"(?<!platform\.)(?<![\w-])(?<!Logits )(?<!tokenizer )(?<!izers, )processors?\b(?![\"'(.])",
    "strip_control_chars": r"\bharmless\b",
    "interleave": r"\bwoven\b",
    "uninterrupted": r"\bin peace\b",
    "sharded": r"\bshared[ _]out\b",
    "underused": r"\bhungry\b|\bstarv(?:e|ed|es|ing)\b",
    "broadcast": r"\bone[ _]voice\b",
    "peak_memory, reset_peak_memory": r"\bmost_held\b|\bforget_most\b",
    "reshard": r"\blet_go\b",
    "TrainStep, CheckpointManager, BadStepFilter": r"(?-i:\bStepper\b|\bSaver\b|\bStepGuard\b)",
    "atomic_directory, atomic_write, attach_path": r"\bwhole_folder\b",
    "compiled graph": r"\bone program after another\b|\bmakes? a program\b",
}
OLD_FILE_NAMES = (
    r"planted|test_planted|test_peak|test_health|test_fit|door|listening|following|keeping|talk|look|guard|shards|"
    r"sharding|stepper|damage|heard|shrink|subject"
)

# CHANGELOG.md says how things were called.
FILES = [
    path
    for path in source_files()
    if path.suffix in {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".cpp", ".txt", ""}
    and name_of(path) not in {"CHANGELOG.md", "LICENSE", "tests/test_words.py"}
]


def hits(pattern):
    """Return "file:line: text" wherever the pattern stands."""
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line, re.IGNORECASE):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:160]}")
    return found


@pytest.mark.parametrize("better", OLD_WORDS)
def test_an_old_word_is_gone(better):
    found = hits(OLD_WORDS[better])
    assert not found, f"write {better}:\n" + "\n".join(found)


def test_no_file_has_an_old_name():
    old = [
        name_of(path)
        for path in source_files()
        if re.fullmatch(OLD_FILE_NAMES, path.stem) and path.is_relative_to(ROOT)
    ]
    assert not old
