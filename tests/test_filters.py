import hashlib
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess_data.pipeline.dedup import Dedup, IntSet, signature
from preprocess_data.pipeline.filters import Filters
from utils.errors import UserError

ZH = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
JA = "これは日本語の文章です。漢字とカタカナもあります。"
KO = "이것은 한국어 문장입니다."
EN = "The quick brown fox isn't lazy; naïve café."
RU = "Съешь же ещё этих мягких французских булок."


@pytest.mark.parametrize(
    "text,language",
    [(ZH, "zh"), (JA, "ja"), (KO, "ko"), (EN, "latin"), (RU, "cyrillic"), ("ｱｲｳ 漢字", "ja"), ("二〇二六年", "zh")],
)
def test_each_language_keeps_its_own_and_drops_the_others(text, language):
    for name in ("zh", "ja", "ko", "latin", "cyrillic"):
        assert Filters(language=name).reason(text) == (None if name == language else f"not {name}")
    assert Filters(language=f"ko,{language}").reason(text) is None


def test_chinese_with_some_latin_and_some_kana_is_chinese():
    zh = Filters(language="zh")
    assert zh.reason(ZH + " GPT-4 and " + "の") is None
    assert zh.reason("中文" + EN) == "not zh"
    assert zh.reason("12, 34; 56") == "not zh"
    assert Filters(language="zh,latin").reason(RU) == "not zh or latin"


def test_lengths():
    filters = Filters(min_characters=3, max_characters=5)
    assert [filters.reason("x" * n) for n in (0, 2, 3, 5, 6)] == ["empty", "too short", None, None, "too long"]
    assert Filters().reason("x" * 10_000) is None


def test_unknown_language_is_one_line_with_the_choices():
    with pytest.raises(UserError, match="klingon is none of zh, ja"):
        Filters(language="zh,klingon")


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(), max_size=30))
def test_any_text_gets_an_answer(text):
    assert Filters(language="zh").reason(text) in (None, "empty", "not zh")
    assert Filters(language="zh").reason("\ud800中") is None


def words(random_, count):
    return [chr(0x4E00 + random_.randrange(3000)) for _ in range(count)]


def similarity(one: str, other: str) -> float:
    """Jaccard of the sets of runs of five characters, the measure that near duplicates are defined by."""
    runs = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_exact_finds_only_the_same_text():
    dedup = Dedup()
    texts = [ZH, EN, ZH + "。", "", ZH, EN.upper()]
    reasons = [dedup.reason(signature(text, "exact")) for text in texts]
    assert reasons == [None, None, None, None, "duplicate", None]
    assert len(signature(ZH, "exact")) == 8


def test_near_duplicates_are_found_at_the_documented_rates():
    """The share of found pairs against 1 - (1 - s**8)**14, over pairs of known similarity."""
    random_ = random.Random(5)
    found, expected = {}, {}
    for i in range(1200):
        text = words(random_, 200)
        changed = list(text)
        for _ in range((1, 2, 5, 9, 25)[i % 5]):
            changed[random_.randrange(len(text))] = chr(0x3400 + random_.randrange(5000))
        one, other = "".join(text), "".join(changed)
        dedup = Dedup()
        assert dedup.reason(signature(one, "near")) is None
        reason = dedup.reason(signature(other, "near"))
        assert reason in (None, "near duplicate")
        found.setdefault(i % 5, []).append(reason is not None)
        expected.setdefault(i % 5, []).append(1 - (1 - similarity(one, other) ** 8) ** 14)
    for kind, hits in found.items():
        share, should = sum(hits) / len(hits), sum(expected[kind]) / len(expected[kind])
        assert abs(share - should) < 0.1, (kind, share, should)
    assert sum(found[0]) == 240 and sum(found[4]) < 20  # one character changed: always; 25 of 200: hardly ever


def test_punctuation_case_and_line_breaks_make_no_difference_to_near():
    dedup = Dedup()
    assert dedup.reason(signature(EN, "near")) is None
    assert dedup.reason(signature(EN.upper().replace(" ", "\n") + "!!", "near")) == "near duplicate"
    assert dedup.reason(signature(ZH, "near")) is None
    assert dedup.reason(signature(re.sub("[，。]", "\n", ZH), "near")) == "near duplicate"


def test_texts_without_words_and_short_ones():
    dedup = Dedup()
    texts = ["，。！", "。", "，。！", "明", "明月", "明。", "1", "2"]
    reasons = [dedup.reason(signature(text, "near")) for text in texts]
    assert reasons == [None, None, "duplicate", None, None, "near duplicate", None, None]


def test_of_unrelated_documents_none_is_a_duplicate():
    random_, dedup = random.Random(2), Dedup()
    assert all(dedup.reason(signature("".join(words(random_, 60)), "near")) is None for _ in range(2000))


def test_a_signature_is_the_same_in_every_process_and_version():
    assert signature(ZH, "exact").hex() == "38707519917246ab"
    near = signature(ZH, "near")
    assert near[:8] == signature(ZH, "exact") and len(near) == 120
    assert hashlib.sha256(near).hexdigest()[:16] == "954fdecdf3bbd18f"


def test_int_set_equals_a_set(monkeypatch):
    monkeypatch.setattr(IntSet, "RECENT", 7)
    random_, ours, theirs = random.Random(3), IntSet(), set()
    edges = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    for number in [*edges, *(random_.choice((random_.randrange(60), random_.getrandbits(64))) for _ in range(2000))]:
        assert (number in ours) == (number in theirs)
        if number not in theirs:
            ours.add(number)
            theirs.add(number)
    assert all(number in ours for number in theirs)
