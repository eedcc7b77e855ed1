"""benchmarks/decode.py: what it needs, and shares that are none above 100%."""

import importlib.util

import pytest
import torch

from benchmarks import decode
from utils.errors import UserError


@pytest.fixture
def without(monkeypatch):
    """without(*names): of the packages that the benchmark compares with, these are not installed and the others are."""
    find_spec = importlib.util.find_spec

    def leave_out(*names):
        installed = {name: None if name in names else object() for name in ("transformers", "xllamacpp", "gguf")}

        def found(name, *more):
            return installed[name] if name in installed else find_spec(name, *more)

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return leave_out


@pytest.mark.parametrize(
    "absent, message",
    [
        ({"xllamacpp"}, r"xllamacpp is not installed: pip install -e .\[bench\], or .* --no_llama_cpp"),
        ({"xllamacpp", "gguf"}, r"xllamacpp and gguf are not installed: pip install -e .\[bench\]"),
        ({"transformers"}, r"transformers is not installed: pip install -e .\[test\]"),
    ],
)
def test_an_absent_package_is_one_line_before_anything_is_measured(monkeypatch, without, absent, message):
    without(*absent)
    monkeypatch.setattr(decode.sys, "argv", ["decode.py"])
    monkeypatch.setattr(decode, "bandwidth", lambda: pytest.fail("measured"))
    with pytest.raises(UserError, match=message) as caught:
        decode.main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--no_llama_cpp"], ["--models=mini_deepseekv3"], ["--rows=[]", "--positions=false"]])
def test_what_is_not_compared_needs_no_package(monkeypatch, without, argv, tmp_path):
    without("xllamacpp", "gguf")
    monkeypatch.setattr(decode.sys, "argv", ["decode.py", *argv, f"--results={tmp_path / 'r.json'}"])
    monkeypatch.setattr(decode, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(decode, "by_position", lambda *_: {})
    seen = []
    monkeypatch.setattr(decode, "compare", lambda config, *_: seen.append(config.llama_cpp) or {"ours bf16": 1.0})
    monkeypatch.setattr(decode, "table", lambda results: "")
    decode.main()
    assert not any(seen)


@pytest.mark.parametrize("again, shares", [(8e9, [0.5, 1.0]), (5e9, [0.8, None]), (1e9, [None, None])])
def test_no_share_of_the_bandwidth_is_above_100_percent(monkeypatch, again, shares):
    """At first 2 GB/s, measured while the machine was busy; the weights are read at 4 and 8."""
    monkeypatch.setattr(decode, "active_bytes", lambda name, precision: 1e6 * decode.BYTES[precision])
    monkeypatch.setattr(decode, "bandwidth", lambda: again)
    about = {"bandwidth_gb_s": 2.0}
    rates = {"transformers bf16": 9e9, "ours int8": 4000.0, "ours bf16 compiled": 4000.0}
    assert list(decode.shares_of_bandwidth("any", rates, about).values()) == shares
    assert about["bandwidth_gb_s"] == max(2.0, again / 1e9)


def test_logits_are_compared_up_to_a_constant():
    logits = torch.randn(50)
    assert decode.difference(logits.log_softmax(0), logits) < 1e-5
    assert decode.difference(logits + 0.5 * torch.randn(50), logits) > 0.1
