"""The statistics of the demo: forms and rhymes of well-known poems, and the sampling of titles."""

import json
import math

import pytest
import torch

from demo import evaluate, poems, report
from demo.bits import bits_per_character
from demo.verse import form_of, rhyme_group, rhymes, split_verses
from engine.runs.registry import load_run
from preprocess_data.corpora import demo_chat
from preprocess_data.corpora.poems import document
from tests.support.small_runs import POEM, small_runs
from utils.errors import UserError

QUIET_NIGHT = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"  # guang shuang yue xiang
SPRING_MORNING = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。"
RIVER_SNOW = "千山鸟飞绝，万径人踪灭。\n孤舟蓑笠翁，独钓寒江雪。"  # mie, xue: ie and üe are one group
NOT_FOUND = "松下问童子，言师采药去。\n只在此山中，云深不知处。"  # qu, chu: rhymed then, not now
MOUNTAIN_WALK = "远上寒山石径斜，白云生处有人家。\n停车坐爱枫林晚，霜叶红于二月花。"
SPRING_VIEW = "国破山河在，城春草木深。\n感时花溅泪，恨别鸟惊心。\n烽火连三月，家书抵万金。\n白头搔更短，浑欲不胜簪。"
CLIMBING = (
    "风急天高猿啸哀，渚清沙白鸟飞回。\n无边落木萧萧下，不尽长江滚滚来。\n"
    "万里悲秋常作客，百年多病独登台。\n艰难苦恨繁霜鬓，潦倒新停浊酒杯。"
)  # hui lai tai bei: one rhyme in its time, two groups now


@pytest.mark.parametrize(
    ("text", "form", "rhyming"),
    [
        (QUIET_NIGHT, "五言绝句", True),
        (SPRING_MORNING, "五言绝句", True),
        (RIVER_SNOW, "五言绝句", True),
        (NOT_FOUND, "五言绝句", False),
        (MOUNTAIN_WALK, "七言绝句", True),
        (SPRING_VIEW, "五言律诗", False),
        (CLIMBING, "七言律诗", False),
    ],
)
def test_known_poems(text, form, rhyming):
    verses = split_verses(text)
    assert form_of(verses) == form
    assert rhymes(verses) is rhyming


@pytest.mark.parametrize(
    "text",
    [
        "",
        "床前明月光",
        "床前明月光，疑是地上霜。\n举头望明月，低头思故。",  # a character short
        "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n举头望明月，低头思故乡。",  # six verses
        "床前明月光，疑是地上霜。\n举头望明月，低头思故x。",
        "床前明月光，疑是地上霜。\n举头望明月，低头思故\ufffd。",
    ],
)
def test_texts_without_a_form(text):
    assert form_of(split_verses(text)) is None


def test_punctuation_and_line_ends_do_not_matter():
    assert split_verses("床前明月光？疑是地上霜！ 举头望明月；\n\n低头思故乡") == split_verses(QUIET_NIGHT)


@pytest.mark.parametrize("same", ["安边宽圆", "因真春云", "生兵明", "中穷", "归飞", "西期", "麻家花", "流楼"])
def test_characters_of_one_group(same):
    assert len({rhyme_group(char) for char in same}) == 1


@pytest.mark.parametrize("different", ["真生", "东京", "西居", "居书", "歌多", "来回"])
def test_characters_of_two_groups(different):
    assert len({rhyme_group(char) for char in different}) == len(different)


def test_a_verse_that_ends_in_no_syllable_does_not_rhyme():
    assert rhyme_group("，") is None
    assert not rhymes(["床前明月光", "疑是地上x", "举头望明月", "低头思故x"])
    assert not rhymes(["床前明月光", "疑是地上霜"])  # one even verse rhymes with nothing


def test_counts():
    bad = "床前明月光，疑是地上霜。"
    counted = poems.count([QUIET_NIGHT, NOT_FOUND, bad], ["五言绝句"] * 3, {"床前明月光"})
    assert (counted.poems, counted.in_form, counted.rhyming, counted.verses, counted.copied) == (3, 2, 1, 10, 2)
    assert poems.count([QUIET_NIGHT], ["七言绝句"], set()).in_form == 0  # correct, but not the requested form


def test_shuffled_poems_keep_shapes_and_verses():
    texts = [QUIET_NIGHT, CLIMBING, SPRING_VIEW, MOUNTAIN_WALK]
    shuffled = poems.shuffled_poems(texts, seed=3)
    assert [form_of(split_verses(text)) for text in shuffled] == [form_of(split_verses(text)) for text in texts]
    assert sorted(v for t in shuffled for v in split_verses(t)) == sorted(v for t in texts for v in split_verses(t))
    assert shuffled == poems.shuffled_poems(texts, seed=3) != poems.shuffled_poems(texts, seed=4)


def corpus(tmp_path, count=4000):
    """Write a corpus of invented poems, so many that about one in fifty is held out."""
    texts = {"五言绝句": QUIET_NIGHT, "七言绝句": MOUNTAIN_WALK, "五言律诗": SPRING_VIEW, "七言律诗": CLIMBING}
    forms = list(texts)
    path = tmp_path / "poems.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            form = forms[i % 4]
            record = {"title": f"题{i}", "author": "佚名", "form": form, "text": texts[form]}
            record["lines"] = split_verses(record["text"])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def test_titles_are_held_out_balanced_and_repeatable(tmp_path):
    held_out, documents, training_verses = poems.load_poems(corpus(tmp_path))
    assert "床前明月光" in training_verses
    total = sum(map(len, held_out.values()))
    assert sorted(documents) == sorted(document(poem) for of_form in held_out.values() for poem in of_form)
    assert 40 < total < 120  # one in fifty of 4,000 is 80
    asked = poems.choose_titles(held_out, 20, seed=1)
    assert asked == poems.choose_titles(held_out, 20, seed=1) != poems.choose_titles(held_out, 20, seed=2)
    assert len({title for title, _ in asked}) == 20
    assert [sum(form == wanted for _, form in asked) for wanted in held_out] == [5] * 4
    with pytest.raises(UserError, match="lower --poems"):
        poems.choose_titles(held_out, 4000, seed=1)


def test_missing_corpus_is_one_line(tmp_path):
    with pytest.raises(UserError, match="preprocess_data.py fetch poems"):
        poems.load_poems(tmp_path / "poems.jsonl")


def test_the_table_has_a_row_for_every_form_and_baseline():
    counts = {"poems": 25, "in_form": 24, "rhyming": 5, "verses": 150, "copied": 3}
    result = {
        "by_form": dict.fromkeys(["五言绝句", "七言绝句", "五言律诗", "七言律诗"], counts),
        "model": counts, "real_poems": counts, "shuffled_poems": counts, "pretrain_bits_per_character": 6.4321,
        "bits_poems": 80,
        "settings": {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "seed": 1},
    }  # fmt: skip
    table = report.table(result)
    assert table.count("96.0%") == 7
    assert "6.432 (title, author and text of 80 held-out poems)" in table and "Tokens seen" not in table
    seen = result | {"tokens": {"pretraining": 3_400_000, "fine-tuning": 612_345}}
    assert report.table(seen).endswith("\nTokens seen: 3.4M in pretraining, 612.3k in fine-tuning")
    imported = result | {"tokens": {"pretraining": None, "fine-tuning": 612_345}}
    assert report.table(imported).endswith("\nTokens seen: 612.3k in fine-tuning")


def test_the_tokens_seen_are_those_of_the_summary(tmp_path):
    assert evaluate.tokens_seen(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"status": "finished", "tokens": 1234}', encoding="utf-8")
    assert evaluate.tokens_seen(tmp_path) == 1234


def test_bits_per_character_equal_a_loop_over_tokens():
    """One document and one token at a time, in float64; batching and padding change nothing."""
    run = load_run(small_runs() / "pretrain_mini_deepseekv3")
    model, tokenizer = run.model, run.tokenizer
    documents = [QUIET_NIGHT, "题\n佚名\n" + SPRING_VIEW, POEM, "一"]
    nats = 0.0
    for text in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for end in range(1, len(ids)):
            logits = model(torch.tensor([ids[:end]]))[0][0, -1].double()
            nats -= logits.log_softmax(dim=-1)[ids[end]].item()
    want = nats / math.log(2) / sum(map(len, documents))
    assert bits_per_character(model, tokenizer, documents, batch_size=3) == pytest.approx(want, rel=1e-4)


def test_the_fixed_requests_are_worded_as_in_training():
    """All five tasks, in their usual words; the answers of an untrained wording would show nothing."""

    class Usual:
        def random(self):
            return 1.0

        def randrange(self, stop):
            return 0

    poem = {"title": "春夜", "form": "五言绝句", "text": QUIET_NIGHT, "lines": split_verses(QUIET_NIGHT),
            "author": "李白", "dynasty": "唐"}  # fmt: skip
    morning = poem | {"lines": split_verses(SPRING_MORNING)}
    idiom = {"idiom": "画蛇添足", "explanation": "比喻做了多余的事，非但无益，反而不合适。"}
    worded = [demo_chat.write_poem(poem, Usual()), demo_chat.continue_couplet(poem, Usual()),
              demo_chat.tell_author(morning, Usual()), demo_chat.explain_idiom(idiom, Usual()),
              demo_chat.name_idiom(idiom, Usual())]  # fmt: skip
    assert {request for request, _ in worded} <= set(evaluate.REQUESTS)
