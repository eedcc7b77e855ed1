"""The causal depthwise convolution against a loop: documents, states, its start."""

import pytest
import torch

from model import State
from model.layers import CausalConv

B, T, D = 2, 23, 5


def conv_loop(x, weight, bias, doc_ids=None):
    out = torch.zeros_like(x)
    size = weight.shape[1]
    for row in range(len(x)):
        for t in range(x.shape[1]):
            for j in range(min(size, t + 1)):
                if doc_ids is None or doc_ids[row, t - j] == doc_ids[row, t]:
                    out[row, t] += weight[:, size - 1 - j] * x[row, t - j]
    return out if bias is None else out + bias


def a_conv(size, bias):
    torch.manual_seed(size)
    conv = CausalConv(D, size, bias).double()
    if bias:
        torch.nn.init.normal_(conv.bias)
    return conv, torch.randn(B, T, D, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_taps_are_those_of_the_last_tokens_of_the_document(size, bias):
    conv, x = a_conv(size, bias)
    doc_ids = torch.tensor([[0, 0, 1, 2, 2, 2, 3, 3, 3, 3, *[4] * 10, -1, -1, -1], [7] * T])
    for docs in (None, doc_ids):
        want = conv_loop(x, conv.weight, conv.bias, docs)
        torch.testing.assert_close(conv(x, doc_ids=docs), want)
        with torch.no_grad():
            torch.testing.assert_close(conv(x, doc_ids=docs), want)


def test_another_document_is_not_even_multiplied():
    """What is not finite there stays there; bf16 inputs are added in fp32."""
    conv, x = a_conv(4, False)
    x[:, :9] = float("inf")
    doc_ids = (torch.arange(T) >= 9).long().expand(B, T)
    assert conv(x, doc_ids=doc_ids)[:, 9:].isfinite().all()
    conv, x = a_conv(4, False)
    half = conv.float()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, conv(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_those_of_the_loop(size):
    conv, x = a_conv(size, True)
    doc_ids = torch.arange(T)[None] // 5 + torch.tensor([[0], [1]])
    grad = torch.randn_like(x)
    for docs in (None, doc_ids):
        results = []
        for looped in (False, True):
            inputs = [x.clone().requires_grad_(), conv.weight, conv.bias]
            out = conv_loop(*inputs, docs) if looped else conv(inputs[0], doc_ids=docs)
            results.append(torch.autograd.grad(out, inputs, grad))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("size", [1, 4])
@torch.no_grad()
def test_chunks_steps_and_tokens_taken_back(size):
    conv, x = a_conv(size, False)
    want = conv_loop(x, conv.weight, None)
    state = State(torch.zeros(B, dtype=torch.long), 60, [{}, {}])
    at = 0
    for n_tokens in (3, 1, 1, 12, 1, 5):
        conv(x[:, :7] + 1, state, 1)  # a trial
        state.advance(7)
        state.rewind(7)
        got = conv(x[:, at : at + n_tokens], state, 1)
        torch.testing.assert_close(got, want[:, at : at + n_tokens])
        state.advance(n_tokens)
        at += n_tokens
    assert state.can_rewind() and [*state.layers[1]] == ["conv"] and not state.layers[0]


def test_its_weights_start_as_those_of_a_convolution():
    conv = CausalConv(1000, 4)
    assert conv.weight.abs().max() <= 0.5 and conv.weight.std() > 0.25 and conv.bias is None
