"""Tokenizers of other projects against transformers: ids, text, where a prompt begins and an answer ends."""

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

import export
import pretrain
import sft
from engine.data.sequences import IGNORE, WindowSequences
from engine.data.token_file import TokenFile
from engine.inference.chat import open_chat_model
from preprocess_data.preprocess_data import main as preprocess
from tests.support.foreign_tokenizers import begin_with, byte_level, llama, save, text_token
from tests.support.models import CHAT_MODEL, sizes_of
from tests.support.small_runs import SIZES
from tests.support.texts import HOSTILE, SENTENCES, random_text, write_lines
from utils.chat_template import encode_chat
from utils.errors import UserError
from utils.foreign_tokenizer import CHAT_TOKENS
from utils.tokenizer import StreamDecoder, load_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

END = "<|endoftext|>"
OWN = {"bos": "<bos>", "unk": "<unk>", "pad": "<pad>"}
# Each of the three roles has the token of the end, one of its own, or none; then two with another shared token.
SHARED = [
    dict(zip(OWN, combination))
    for combination in itertools.product(*((END, token, None) for token in OWN.values()))
] + [{"bos": "<bos>", "unk": "<bos>", "pad": "<bos>"}, {"bos": None, "unk": "<pad>", "pad": "<pad>"}]  # fmt: skip


def settings_of(roles):
    return {"eos_token": END, **{f"{role}_token": token for role, token in roles.items()}}


def backend_for(roles, begins):
    backend = byte_level([END, *OWN.values()])
    if begins:
        begin_with(backend, roles["bos"])
    return backend


def streamed(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, ids)) + decoder.flush()


# ---------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("begins", [False, True])
def test_shared_roles_begin_and_end_as_in_transformers(begins, tmp_path):
    for number, roles in enumerate(SHARED):
        if begins and roles["bos"] is None:
            continue
        folder = save(backend_for(roles, begins), tmp_path / str(number), **settings_of(roles))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(folder, {"eos_token_id": theirs.eos_token_id})
        for text in (*SENTENCES, " x", "a\n"):
            assert tokenizer.encode_prompt(text) == theirs(text).input_ids, (roles, text)
        assert tokenizer.vocab_size == len(theirs) + len(CHAT_TOKENS)  # no role got a new token
        assert tokenizer.end_ids == {theirs.eos_token_id}
        for role in OWN:
            assert tokenizer.role_id(role) == getattr(theirs, f"{role}_token_id"), (roles, role)
        assert tokenizer.encode_prompt("")[0] < len(theirs)  # of no text, a token that was trained


def greedy(model, prompt, count, **settings):
    """With a mask: without one, transformers takes a token of the prompt that also pads for padding."""
    mask = torch.ones_like(prompt)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **settings
    )


def end_after(model, ids, prompt, count):
    """Change the output head so that greedy decoding gives one of `ids` after `count` other tokens."""
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[ids] = 0
        out = greedy(model, prompt, count, eos_token_id=None)
        hidden = model.model(out).last_hidden_state[0, -1]
        rows[ids[-1]] = hidden * ((rows @ hidden).max() + 1) / hidden.dot(hidden)


def answers(folder, run, text):
    """(tokens, text, finish) of a greedy answer here, and (tokens, text without an end) of transformers."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = theirs(text, return_tensors="pt").input_ids
    out = greedy(model, prompt, 40)[0, prompt.shape[1] :].tolist()
    with open_chat_model(run, "cpu") as chat_model:
        assert chat_model.text_ids(text) == prompt[0].tolist()
        generation = chat_model.generate([{"role": "user", "content": text}], 40, temperature=0)
        pieces = list(generation)
    ours = (generation.ids[prompt.shape[1] :], "".join(pieces), generation.finish)
    return ours, (out, theirs.decode(out[: len(ours[0])], skip_special_tokens=True))


def check_answers(folder, tmp_path, text, ends):
    """Import the folder, and compare a greedy answer that ends with one of `ends` (none: that never ends)."""
    run = tmp_path / f"run_{folder.name}"
    export.main(["--from", "hf", str(folder), "--out", str(run)])
    (tokens, shown, finish), (out, want) = answers(folder, run, text)
    if ends:
        assert 0 < len(tokens) < 30 and finish == "stop" and out == [*tokens, out[-1]] and out[-1] in ends
    else:
        assert finish == "length" and tokens == out
    assert shown == want
    return run


@pytest.mark.parametrize(
    "roles,begins",
    [
        ({"bos": END, "unk": END, "pad": None}, False),  # SmolLM, GPT-2
        ({"bos": END, "unk": END, "pad": END}, True),  # OPT
        ({"bos": None, "unk": None, "pad": END}, False),  # Qwen
        ({"bos": "<bos>", "unk": None, "pad": None}, True),  # Llama 3
    ],
)
def test_greedy_answers_are_those_of_transformers(roles, begins, tmp_path):
    folder = save(backend_for(roles, begins), tmp_path / "theirs", **settings_of(roles))
    text = "The quick 月"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = llama(folder, len(theirs), eos_token_id=theirs.eos_token_id, bos_token_id=theirs.bos_token_id)
    end_after(model, [theirs.eos_token_id], theirs(text, return_tensors="pt").input_ids, 6)
    model.save_pretrained(folder)
    run = check_answers(folder, tmp_path, text, {theirs.eos_token_id})

    exported = tmp_path / "exported"
    export.main(["--run", str(run), "--to", "hf", str(exported)])
    again = transformers.AutoTokenizer.from_pretrained(exported)
    tokenizer = load_tokenizer(run / "tokenizer")
    assert again(text).input_ids == tokenizer.encode_prompt(text) == theirs(text).input_ids
    chat = [{"role": "user", "content": "Hello  月"}, {"role": "assistant", "content": " a\nb"}]
    assert again.apply_chat_template(chat, return_dict=False) == encode_chat(tokenizer, chat)[0]
    assert transformers.GenerationConfig.from_pretrained(exported).eos_token_id == [theirs.eos_token_id]
    check_answers(exported, tmp_path, text, {theirs.eos_token_id})


@pytest.mark.parametrize(
    "config,generation,ends",
    [
        ([0, 7, 9], None, [0, 7, 9]),  # a list in config.json
        (0, [0, 9], [0, 9]),  # Llama 3 instruct: generation_config.json has more
        ([0, 9], 0, [0]),  # it counts alone
        (0, "gone", []),  # and ends nothing if it names no end
        (None, None, []),
        (9, None, [9]),  # the end of the model is not the tokenizer's
        ([-1, 9], None, [9]),
    ],
)
def test_lists_of_ends(config, generation, ends, tmp_path):
    folder = save(byte_level([END, "<|im_end|>"]), tmp_path / "theirs", eos_token=END)
    text = "isn't lazy"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = llama(folder, len(theirs))
    end_after(model, [1, *ends], theirs(text, return_tensors="pt").input_ids, 5)
    if not ends:
        end_after(model, [0], theirs(text, return_tensors="pt").input_ids, 5)  # its token alone does not end anything
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        written = {} if generation == "gone" else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(written))
    run = check_answers(folder, tmp_path, text, ends)
    tokenizer = load_tokenizer(run / "tokenizer")
    assert tokenizer.end_ids == set(ends)
    assert tokenizer.stop_ids == {*ends, 0, 1}  # after fine-tuning also the end of a turn, which it has already


def test_without_an_end_in_config_json_nothing_ends_an_answer(tmp_path):
    folder = save(byte_level([END]), tmp_path / "theirs", eos_token=END)
    llama(folder, 300)
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token_id"}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    export.main(["--from", "hf", str(folder), "--out", str(tmp_path / "run")])
    assert load_tokenizer(tmp_path / "run/tokenizer").end_ids == set() and theirs.eos_token_id is None


# --------------------------------------------------------------------------------------------------- added tokens

ADDED = {
    "spaces": text_token("    "),
    "newlines": text_token("\n\n"),
    "Chinese": text_token("春天"),
    "word": text_token("moon"),
    "accent": text_token("café"),  # all its characters stand for bytes, too
    "emoji": text_token("🙂🙂"),
    "byte alphabet": text_token("Ġĉ"),
    "mixed": text_token("月 moon\t"),
    "tool": text_token("<tool>"),
    "normalized": text_token("Lazy", normalized=True),
    "lstrip": text_token("<l>", lstrip=True),
    "rstrip": text_token("<r>", rstrip=True),
    "single word": text_token("ox", single_word=True),
    "special": AddedToken("<|tool|>", special=True),
    "special Chinese": AddedToken("明月", special=True, lstrip=True),
}
PIECES = [token.content for token in ADDED.values()] + [" ", "ox1", "fox", "春", "LAZY", "lazy", "é", *SENTENCES[:3]]


def check_texts(tokenizer, theirs, texts, split):
    """Ids of texts, and the text of ids, all at once and streamed."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=split).input_ids, text
    rng = random.Random(0)
    for _ in range(60):
        ids = rng.choices(range(len(theirs)), k=12) + rng.choices(list(theirs.added_tokens_decoder), k=6)
        rng.shuffle(ids)
        want = theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == want
        assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
        for i in ids:
            tokenizer.token_bytes(i)


@pytest.mark.parametrize(
    "normalizer", [None, normalizers.Lowercase(), normalizers.NFC()], ids=["plain", "lower", "NFC"]
)
@pytest.mark.parametrize("how", ["tokenizer.json", "save_pretrained", "added_tokens.json"])
def test_added_tokens_are_those_of_transformers(how, normalizer, tmp_path):
    backend = byte_level([END], normalizer=normalizer)
    folder = tmp_path / "theirs"
    if how == "tokenizer.json":
        backend.add_tokens(list(ADDED.values()))
        save(backend, folder, bos_token=END, eos_token=END)
    elif how == "save_pretrained":  # after training, by transformers
        save(backend, folder, bos_token=END, eos_token=END)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.add_tokens(list(ADDED.values()))
        theirs.save_pretrained(folder)
    else:  # of old folders, which say nothing about flags
        save(backend, folder, bos_token=END, eos_token=END, additional_special_tokens=["<|tool|>"])
        ids = {token.content: 300 + i for i, token in enumerate(ADDED.values())}
        (folder / "added_tokens.json").write_text(json.dumps(dict(reversed(ids.items()))))
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|pad|>"}}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(1, 8))) for _ in range(150)]
    tokenizer = load_tokenizer(folder, {"eos_token_id": 0})
    assert len(theirs) == tokenizer.vocab_size - len(CHAT_TOKENS) > 300 + len(ADDED) - 1
    check_texts(tokenizer, theirs, texts, split=True)
    special = theirs.all_special_tokens + [token.content for token in ADDED.values() if token.special]
    plain = [text for text in texts if not any(token in text.lower() for token in special)]
    check_texts(tokenizer, theirs, plain, split=False)
    for i in theirs.added_tokens_decoder:
        assert tokenizer.characters[i] == (0 if i in tokenizer.special_ids else len(tokenizer.decode([i])))

    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint and copy.roles == tokenizer.roles
    check_texts(copy, theirs, texts[:20], split=True)


def test_an_answer_of_added_tokens_is_streamed_as_transformers_decodes_it(tmp_path):
    backend = byte_level([END])
    backend.add_tokens(list(ADDED.values()))
    folder = save(backend, tmp_path / "theirs", bos_token=END, eos_token=END)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = llama(folder, len(theirs), seed=3)
    with torch.no_grad():
        model.lm_head.weight[:300] *= 0.1  # the added tokens are the likely ones
    model.save_pretrained(folder)
    run = tmp_path / "run"
    export.main(["--from", "hf", str(folder), "--out", str(run)])
    (tokens, shown, _), (out, want) = answers(folder, run, "a    b")
    assert tokens == out and shown == want and len({*out} & {*range(300, 315)}) > 1


def test_a_role_marker_never_comes_from_a_text(tmp_path):
    """Even where the folder calls the markers text: a turn that a user writes would be one."""
    backend = byte_level([END])
    backend.add_tokens([text_token(token) for token in CHAT_TOKENS])
    tokenizer = load_tokenizer(save(backend, tmp_path / "theirs", eos_token=END))
    assert not {tokenizer.im_start_id, tokenizer.im_end_id, 0} & {*tokenizer.encode(f"a<|im_start|>b<|im_end|>{END}")}
    assert tokenizer.think_id in tokenizer.encode("<think>")  # text, as in transformers
    assert tokenizer.vocab_size == 304


def test_reserved_slots_become_chat_tokens_but_no_word_does(tmp_path):
    names = [END, "<|reserved_0|>", "<|reserved_special_token_1|>", "<|reserved_2|>"]
    backend = byte_level(names)
    backend.add_tokens([text_token("dummy"), text_token("<unused1>")])
    tokenizer = load_tokenizer(save(backend, tmp_path / "theirs", eos_token="<|reserved_0|>"))
    assert [tokenizer.im_start_id, tokenizer.im_end_id] == [2, 3] and tokenizer.eos_id == 1
    assert tokenizer.decode(tokenizer.encode("dummy<unused1>")) == "dummy<unused1>"
    assert {tokenizer.think_id, tokenizer.end_think_id} == {302, 303}


# --------------------------------------------------------------------------- a model from scratch with their tokenizer


def sentencepiece():
    """A vocabulary with spaces as U+2581 and single bytes for what it lacks, as Llama 2 has it."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    for token in ["\u2581", *"ABCDEFGH月", "\u2581A", "AB", "CD", "EF"]:
        vocab[token] = len(vocab)
    merges = [("\u2581", "A"), ("A", "B"), ("C", "D"), ("E", "F")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    begin_with(backend, "<s>")
    return backend


def folder_of(kind, folder):
    if kind == "GPT-2":
        return save(byte_level([END]), folder, bos_token=END, eos_token=END, unk_token=END)
    if kind == "Qwen":
        return save(byte_level([END, *CHAT_TOKENS]), folder, bos_token=None, eos_token="<|im_end|>", pad_token=END)
    if kind == "Llama 3":
        backend = byte_level(["<|begin|>", "<|end|>", *(f"<|reserved_{i}|>" for i in range(6))])
        begin_with(backend, "<|begin|>")
        return save(backend, folder, bos_token="<|begin|>", eos_token="<|end|>")
    if kind == "Llama 2":
        return save(sentencepiece(), folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    backend = byte_level([])  # no special token at all, and added text
    backend.add_tokens([text_token("    "), text_token("ABCD")])
    return save(backend, folder)


def from_scratch(kind, tmp_path, steps):
    """Preprocess, pretrain and fine-tune with a folder of others; returns the two runs."""
    folder = folder_of(kind, tmp_path / "theirs")
    texts = ["".join("ABCDEFGH"[(i + start) % 8] for i in range(12)) for start in range(8)]
    documents = [{"text": text + " 月" * (i % 3)} for i, text in enumerate(texts * 30)]
    chats = [{"messages": [{"role": "user", "content": t[:4]}, {"role": "assistant", "content": t[4:]}]} for t in texts]
    data = tmp_path / "data"
    common = [f"--tokenizer_path={folder}", f"--data_path={data}", "--workers=1", "--max_bad_ratio=1"]
    preprocess(["pretrain", f"--sources={write_lines(tmp_path / 'documents.jsonl', documents)}", *common])
    preprocess(["sft", f"--sources={write_lines(tmp_path / 'chats.jsonl', chats * 20)}", *common])
    shared = [f"--output_path={tmp_path}", "--device=cpu", "--eval_interval=0", "--sample_interval=0"]
    sizes = [f"--model.{key}={value}" for key, value in sizes_of(CHAT_MODEL, SIZES).items()]
    files = [f"--tokenizer_path={folder}", f"--pretrain_data_path={data / 'pretrain_train.bin'}", "--max_seq_len=64"]
    base = pretrain.main(
        [f"--model_name={CHAT_MODEL}", *shared, *files, *sizes, f"--max_steps={steps}", "--max_batch_size=8",
         "--max_lr=0.02", "--skip_checks"]
    )  # fmt: skip
    tuned = sft.main(
        [f"--init_from={base['run']}", *shared, f"--sft_data_path={data / 'sft_train.bin'}", f"--max_steps={steps}",
         "--max_batch_size=8", "--max_lr=0.02"]
    )  # fmt: skip
    return folder, data, base, tuned


def check_from_scratch(kind, tmp_path, steps):
    folder, data, base, tuned = from_scratch(kind, tmp_path, steps)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    file = TokenFile(data / "pretrain_train.bin", tokenizer, "make")
    bounds = file.documents()
    for start, end in zip(bounds[:20], bounds[1:]):
        ids = file.read(slice(start, end)).tolist()
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        text = tokenizer.decode(ids)
        assert ids[1:-1] == theirs(text, add_special_tokens=False).input_ids
    for i in range(3):  # every end is learned, no beginning is
        sequence = WindowSequences(file, 64).sequence(i)
        starts = set(bounds.tolist())
        for at, target in enumerate(sequence["targets"].tolist(), i * 64 + 1):
            assert (target == IGNORE) == (at in starts or at >= len(file.tokens))
        boundaries = np.flatnonzero(np.diff(sequence["doc_ids"])) + 1 + i * 64
        assert set(boundaries.tolist()) <= starts | {len(file.tokens) - 1}
    assert base["val_loss"] < 2 and tuned["status"] == "finished"
    for run, prompt, want in ((base, "ABCD", "EFGH"), (tuned, "EFGH", "ABCDEFGH")):
        with open_chat_model(run["run"], "cpu") as model:
            generation = model.generate([{"role": "user", "content": prompt}], 40, temperature=0)
            text = "".join(generation)
        assert text.startswith(want) and generation.finish == "stop", (kind, text)
    return base, tuned


@pytest.mark.slow
def test_a_model_from_scratch_with_a_tokenizer_of_others(tmp_path):
    """GPT-2's, where one token begins, ends and pads; and test.py talks to it."""
    base, _ = check_from_scratch("GPT-2", tmp_path, 60)
    exported = tmp_path / "exported"
    export.main(["--run", base["run"], "--to", "hf", str(exported)])
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    tokenizer = load_tokenizer(f"{base['run']}/tokenizer")
    assert theirs("abc").input_ids == tokenizer.encode_prompt("abc") == [0, *tokenizer.encode("abc")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen", "Llama 3", "Llama 2", "no special token"])
def test_every_stage_with_a_tokenizer_of_others(kind, tmp_path):
    _, tuned = check_from_scratch(kind, tmp_path, 250)
    command = [sys.executable, "test.py", f"--run={tuned['run']}", "--prompt=EFGH", "--temperature=0", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "ABCDEFGH", done.stderr
    if kind != "Llama 2":
        export.main(["--run", tuned["run"], "--to", "hf", str(tmp_path / "exported")])
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
        tokenizer = load_tokenizer(f"{tuned['run']}/tokenizer")
        chat = [{"role": "user", "content": "EFGH"}]
        want = encode_chat(tokenizer, chat, add_generation_prompt=True)[0]
        assert again.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == want
        assert again("ab").input_ids == tokenizer.encode_prompt("ab")


def test_text_of_a_vocabulary_that_is_not_byte_level_is_streamed(tmp_path):
    tokenizer = load_tokenizer(folder_of("Llama 2", tmp_path))
    rng = random.Random(2)
    for text in [*HOSTILE, *SENTENCES, *(random_text(rng, 20) for _ in range(100))]:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    for _ in range(200):
        ids = rng.choices(range(tokenizer.vocab_size), k=12)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


# -------------------------------------------------------------------------------------------------- damaged files

POINTER = "version https://git-lfs.example/spec/v1\noid sha256:0123\nsize 1234567\n"
DAMAGED = [
    ("tokenizer.json", POINTER, "git-lfs pointer.*git lfs pull"),
    ("tokenizer.json", "{", "cannot be read"),
    ("tokenizer.json", "[]", "cannot be read"),
    ("tokenizer.json", '{"model": {}}', "cannot be read"),
    ("tokenizer.json", b"\xff\xfe", "cannot be read"),
    ("tokenizer_config.json", POINTER, "git-lfs pointer"),
    ("tokenizer_config.json", "{", "cannot be read"),
    ("tokenizer_config.json", "[1]", "no JSON object"),
    ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3"),
    ("tokenizer_config.json", '{"eos_token": {"content": []}}', r"eos_token=\[\]"),
    ("tokenizer_config.json", '{"extra_special_tokens": 7}', "extra_special_tokens=7"),
    ("tokenizer_config.json", '{"additional_special_tokens": [7]}', "the token 7"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 5}}', "the token 5"),
    ("special_tokens_map.json", "{", "cannot be read"),
    ("added_tokens.json", '{"a": "b"}', "a='b'"),
    ("generation_config.json", "{", "cannot be read"),
    ("generation_config.json", POINTER, "git-lfs pointer"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id='2'"),
    ("config.json", '{"eos_token_id": [1.5]}', r"eos_token_id=\[1.5\]"),
    ("config.json", '{"eos_token_id": true}', "eos_token_id=True"),
]


@pytest.mark.parametrize("name,content,message", DAMAGED, ids=[f"{name} {text[:30]!r}" for name, text, _ in DAMAGED])
def test_a_damaged_file_of_a_tokenizer_is_one_line(name, content, message, tmp_path):
    folder = save(byte_level([END]), tmp_path / "theirs")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
