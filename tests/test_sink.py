"""Attention sinks: every form against a loop in float64, values and gradients."""

import pytest
import torch

from model import kernels
from model.kernels import attention as forms
from model.layers import packed_mask, sink_attention, token_positions, window_mask
from tests.support.attention_reference import attention_loop, random_attention

B, T = 2, 150
plain = getattr(sink_attention, "__wrapped__", sink_attention)


def with_gradients(form, tensors, mask, grad):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = form(*tensors, mask)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("window", [None, 9, 70])
def test_forms_agree_with_the_loop_and_their_gradients_with_each_other(window):
    """More than one block of queries; heads in groups, and sinks far above and below the scores."""
    q, k, v, sink = random_attention(B, T)
    sink = sink + torch.tensor([0.0, 5.0, -30.0, 1.0])
    doc_ids = (torch.arange(T) // 61).expand(B, T).clone()
    doc_ids[1, 140:] = -1
    grad = torch.randn(B, T, 4, 6, dtype=torch.float64)
    for docs in (None, doc_ids):
        want = attention_loop(q[:, :40], k[:, :40], v[:, :40], sink, window, None if docs is None else docs[:, :40])
        mask = window_mask(token_positions(doc_ids), None, docs, window)
        exact = with_gradients(plain, (q, k, v, sink), mask, grad)
        torch.testing.assert_close(exact[0][:, :40], want, rtol=1e-10, atol=1e-10)
        for dtype, tolerance in (torch.float64, 1e-10), (torch.float32, 1e-5):
            inputs = [x.to(dtype) for x in (q, k, v, sink)]
            got = with_gradients(sink_attention, inputs, mask, grad.to(dtype))
            for mine, theirs in zip(got, exact, strict=True):
                assert (mine.double() - theirs).norm() < tolerance * theirs.norm()
            with torch.no_grad():  # a prefill
                out = sink_attention(*inputs, mask)
            assert (out.double() - exact[0]).norm() < tolerance * exact[0].norm()


def test_a_sink_takes_its_share_of_the_denominator():
    q, k, v, sink = random_attention(1, 5)
    out = sink_attention(q * 0, k, v, sink * 0)
    torch.testing.assert_close(out[0, 3, 0], v[0, :4, 0].sum(dim=0) / 5)  # five equal scores, the fifth without a value
    assert sink_attention(q, k, v, sink * 0 + 100).abs().max() < 1e-30
    without = sink_attention(q, k, v, sink * 0 - 1e4)
    torch.testing.assert_close(without, attention_loop(q, k, v))


@pytest.mark.parametrize("scale", [None, 0.7])
def test_one_query_with_keys_in_any_order(scale):
    """As a ring has them, some of them hidden."""
    q, k, v, sink = random_attention(3, 12)
    mask = torch.rand(3, 1, 1, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 4] = True
    want = plain(q[:, :1], k, v, sink, mask, scale)
    torch.testing.assert_close(sink_attention(q[:, :1], k, v, sink, mask, scale), want)
    single = [x.float() for x in (q[:, :1], k, v, sink)]
    torch.testing.assert_close(sink_attention(*single, mask, scale).double(), want, rtol=1e-5, atol=1e-6)


def test_bf16_is_near():
    q, k, v, sink = random_attention(B, 70)
    mask = window_mask(torch.arange(70)[None], window=20)
    want = plain(q, k, v, sink, mask)
    got = sink_attention(*(x.bfloat16() for x in (q, k, v)), sink.float(), mask)
    assert got.dtype == torch.bfloat16 and (got.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.skipif(not kernels.ENABLED, reason="MINI_LLM_KERNELS=0: FlexAttention is off")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_scales_by_the_share_of_the_keys(monkeypatch):
    """Its eager form holds all scores, and takes the same mask."""
    q, k, v, sink = random_attention(B, 300, dtype=torch.float32)
    doc_ids = (torch.arange(300) // 61).expand(B, 300)
    positions = token_positions(doc_ids)
    monkeypatch.setattr(forms, "widest_flex_head", lambda x: 128)
    monkeypatch.setattr(forms, "NARROWEST_FLEX_HEAD", 2)
    in_window = window_mask(positions, None, doc_ids, 70), forms.window_blocks(positions, 70, doc_ids)
    for mask in (packed_mask(positions, None, doc_ids), forms.PackedMask(*in_window)):
        with torch.no_grad():
            got = sink_attention(q, k, v, sink, mask)
        torch.testing.assert_close(got, plain(q, k, v, sink, mask.dense), rtol=1e-4, atol=1e-5)
