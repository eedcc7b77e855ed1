"""Token files, sequences, packing, order."""

import json

import numpy as np
import pytest

from engine.data.loader import StepLoader, held_out_batches
from engine.data.sequences import IGNORE, PADDING, DocumentSequences, WindowSequences
from engine.data.shuffle import shuffled
from engine.data.token_file import TokenFile
from engine.training.batch_plan import BatchPlan
from tests.support.make_tokenizer import make_tokenizer
from tests.support.token_files import pretrain_files, write_tokens
from utils.errors import UserError


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


def documents(tokenizer, lengths):
    """Documents of given lengths whose inner tokens are all different from one another."""
    inner = iter(range(16, 10_000))
    return [[tokenizer.bos_id, *(next(inner) % 256 + 16 for _ in range(n - 2)), tokenizer.eos_id] for n in lengths]


def test_windows_hold_every_target_once(tmp_path, tokenizer):
    docs = documents(tokenizer, [5, 9, 12, 3, 20])
    file = TokenFile(write_tokens(tmp_path / "d", docs, tokenizer), tokenizer, "make")
    data = WindowSequences(file, 8)
    flat = np.concatenate(docs)
    assert len(data) == 6  # 48 targets
    seen = np.concatenate([data.sequence(i)["targets"] for i in range(len(data))])[: len(flat) - 1]
    expected = np.where(flat[1:] == tokenizer.bos_id, IGNORE, flat[1:])
    assert (seen == expected).all()
    sequence = data.sequence(0)
    assert sequence["input_ids"].tolist() == flat[:8].tolist()
    assert sequence["doc_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    last = data.sequence(5)
    assert (last["targets"][len(flat) - 1 - 40 :] == IGNORE).all()
    assert ((last["doc_ids"] == PADDING) == (np.arange(8) >= len(flat) - 1 - 40)).all()


def test_documents_hold_every_target_once(tmp_path, tokenizer):
    docs = documents(tokenizer, [5, 9, 12, 3, 20, 2, 7])
    file = TokenFile(write_tokens(tmp_path / "d", docs, tokenizer), tokenizer, "make")
    expected = sorted(token for doc in docs for token in doc[1:])
    for pack in (True, False):
        data = DocumentSequences(file, 8, pack=pack)
        sequences = [data.sequence(i) for i in range(len(data))]
        targets = np.concatenate([sequence["targets"] for sequence in sequences])
        assert sorted(targets[targets != IGNORE].tolist()) == expected
        for sequence in sequences:  # within a document a target is the next input
            assert ((sequence["doc_ids"] == PADDING) == (sequence["input_ids"] == tokenizer.pad_id)).all()
            same = sequence["doc_ids"][:-1] == sequence["doc_ids"][1:]
            valid = same & (sequence["targets"][:-1] != IGNORE) & (sequence["targets"][1:] != IGNORE)
            assert (sequence["targets"][:-1][valid] == sequence["input_ids"][1:][valid]).all()
    assert len(DocumentSequences(file, 8, pack=True)) < len(DocumentSequences(file, 8, pack=False))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_shuffle_is_a_permutation(n):
    places = np.arange(n)
    first, second = shuffled(places, n, 1, 0), shuffled(places, n, 1, 1)
    assert sorted(first) == sorted(second) == list(range(n))
    assert (shuffled(places[n // 2 :], n, 1, 0) == first[n // 2 :]).all()  # a pure function of the place
    if n >= 64:
        assert (first != second).any() and (first != shuffled(places, n, 2, 0)).any()
        assert abs(np.corrcoef(places, first)[0, 1]) < 0.3


def test_three_epochs_with_kills_on_any_number_of_ranks(tmp_path, tokenizer):
    """Loaders that are dropped at random steps and started again from the step's number, on 1, 2 and 4 ranks."""
    file = TokenFile(pretrain_files(tmp_path, tokenizer)[0], tokenizer, "make")
    data, random = WindowSequences(file, 16), np.random.default_rng(0)
    steps = -(-3 * len(data) // 8)

    def run(n_ranks):
        plan, done, work = BatchPlan(8, 2, 4 // n_ranks), 0, []
        while done < steps:
            stop = min(steps, done + int(random.integers(1, 20)))
            loaders = [StepLoader(data, plan, 7, done, steps, rank, n_ranks) for rank in range(n_ranks)]
            for _, parts in zip(range(done, stop), zip(*loaders)):
                work.append(parts)
            for loader in loaders:  # with steps made ahead of time, which are lost
                loader.close()
            done = stop
        return work

    runs = {n_ranks: run(n_ranks) for n_ranks in (1, 2, 4)}
    order = [index for (part,) in runs[1] for index in part.sequences]
    epochs = [order[i * len(data) : (i + 1) * len(data)] for i in range(3)]
    assert all(sorted(epoch) == list(range(len(data))) for epoch in epochs) and epochs[0] != epochs[1]
    expected = np.stack([data.sequence(i)["input_ids"] for i in order]).reshape(steps, 8, 16)
    for n_ranks, work in runs.items():
        for step, parts in enumerate(work):
            assert all(part.sequences == order[8 * step : 8 * step + 8] for part in parts)
            dealt = [parts[i % n_ranks].batches[i // n_ranks]["input_ids"] for i in range(4)]  # micro-batches in turn
            assert (np.concatenate(dealt) == expected[step]).all()


def test_held_out_batches_cover_all_data_once(tmp_path, tokenizer):
    file = TokenFile(pretrain_files(tmp_path, tokenizer)[1], tokenizer, "make")
    data = DocumentSequences(file, 32, pack=True)
    expected = sum(int((data.sequence(i)["targets"] != IGNORE).sum()) for i in range(len(data)))
    for n_ranks in (1, 2):
        batches = [b for rank in range(n_ranks) for b in held_out_batches(data, 4, 0, rank, n_ranks)]
        assert {tuple(batch["targets"].shape) for batch in batches} == {(4, 32)}
        assert sum(int((batch["targets"] != IGNORE).sum()) for batch in batches) == expected


def test_unpacked_sequences_are_trimmed(tmp_path, tokenizer):
    file = TokenFile(pretrain_files(tmp_path, tokenizer)[0], tokenizer, "make")
    loader = StepLoader(DocumentSequences(file, 128, pack=False), BatchPlan(2, 2, 1), 0, 0, 3, trim=True)
    for work in loader:
        assert work.batches[0]["input_ids"].shape[1] <= 48 and "doc_ids" not in work.batches[0]


def test_file_errors_are_one_line(tmp_path, tokenizer, capsys):
    path = write_tokens(tmp_path / "d", documents(tokenizer, [6, 8]), tokenizer)
    meta = json.loads((tmp_path / "d.meta.json").read_text())

    def fails(message, at=path, **changes):
        (tmp_path / "d.meta.json").write_text(json.dumps({**meta, **changes}))
        with pytest.raises(UserError, match=message) as caught:
            TokenFile(at, tokenizer, "python make.py")
        assert "\n" not in str(caught.value)

    fails("no data file .*python make.py", at=tmp_path / "none.bin")
    fails("another tokenizer", tokenizer_fingerprint="other")
    fails("token id 272, beyond the vocabulary of 272", max_id=272)
    fails("meta file lists 99", tokens=99)
    (tmp_path / "d.docs.npy").unlink()
    (tmp_path / "d.meta.json").unlink()  # without meta: read as uint16 with a warning, ids checked on reading
    np.array([1, 20, 2, 1, 60_000, 2], "<u2").tofile(path)
    file = TokenFile(path, tokenizer, "make")
    assert "reading" in capsys.readouterr().err
    assert file.documents().tolist() == [0, 3, 6]
    with pytest.raises(UserError, match="token id 60000"):
        list(StepLoader(WindowSequences(file, 8), BatchPlan(1, 1, 1), 0, 0, 1))  # from the thread to the caller
