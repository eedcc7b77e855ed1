"""Packed sequences through flex_attention, as on CUDA, against the dense mask.

A CPU compiles its forward; its gradients are those of the operator's own formula, with the device check switched off.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from model import layers
from model.kernels import ENABLED
from model.kernels import attention as kernels
from tests.support.packed_models import SIZES, TOKENS, counter, flex_calls, packed_batch, small_model

pytestmark = pytest.mark.skipif(not ENABLED, reason="MINI_LLM_KERNELS=0: FlexAttention is off")

positions = torch.arange(TOKENS)[None]


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "widest_flex_head", lambda x: 128 if torch.compiler.is_compiling() else 0)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # "does not support backward"
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attend(q, k, v, doc_ids):
    return layers.attention(q, k, v, layers.packed_mask(positions, doc_ids=doc_ids), 0.3)


def test_blocks_are_those_of_the_dense_mask():
    doc_ids = packed_batch(0)["doc_ids"]
    dense = layers.attention_mask(positions, doc_ids=doc_ids)
    blocks = kernels.document_blocks(doc_ids)
    assert torch.equal(flex_attention.create_mask(blocks.mask_mod, 3, 1, TOKENS, TOKENS, "cpu"), dense)
    padded = torch.nn.functional.pad(dense, (0, 384 - TOKENS, 0, 384 - TOKENS))
    assert torch.equal(blocks.to_dense().bool(), padded.unfold(2, 128, 128).unfold(3, 128, 128).any(dim=(-1, -2)))
    assert not blocks.to_dense().tril().all()  # there are some to leave out


def test_eager_and_cpu_keep_the_dense_mask(monkeypatch):
    monkeypatch.setattr(kernels, "document_blocks", None)
    assert layers.packed_mask(positions, doc_ids=packed_batch(0)["doc_ids"]).dtype == torch.bool
    monkeypatch.setattr(kernels, "widest_flex_head", lambda x: 128)  # and so does a sequence of a single block
    assert layers.packed_mask(positions[:, :128], doc_ids=packed_batch(0)["doc_ids"][:, :128]).dtype == torch.bool


@pytest.mark.parametrize(
    "dtype, capability, widest",
    [
        (torch.bfloat16, (9, 0), 128),
        (torch.float16, (8, 0), 128),
        (torch.bfloat16, (8, 9), 64),
        (torch.bfloat16, (12, 0), 64),
        (torch.float16, (7, 5), 0),
        (torch.float32, (9, 0), 0),
    ],
)
def test_the_widest_head_of_a_gpu(dtype, capability, widest, monkeypatch):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert kernels.widest_flex_head(q) == 0  # eager
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.widest_flex_head(q) == widest
    q.device = torch.device("cpu")
    assert kernels.widest_flex_head(q) == 0


@pytest.mark.parametrize("size", [8, 160])
def test_heads_that_flex_does_not_take_use_the_dense_mask(size, monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, TOKENS, 2, size)
    doc_ids = packed_batch(0)["doc_ids"]
    want = attend(q, k, v, doc_ids)
    monkeypatch.setattr(kernels, "widest_flex_head", lambda x: 128)
    monkeypatch.setattr(kernels, "flex_attention", None)
    assert isinstance(layers.packed_mask(positions, doc_ids=doc_ids), kernels.PackedMask)
    assert torch.equal(attend(q, k, v, doc_ids), want)


def test_attention_mask_stays_a_tensor(monkeypatch):
    """Under the same conditions: for example a window of the model's own."""
    monkeypatch.setattr(kernels, "widest_flex_head", lambda x: 128)
    doc_ids = packed_batch(0)["doc_ids"]
    dense = layers.attention_mask(positions, doc_ids=doc_ids)
    assert dense.dtype == torch.bool and torch.equal(dense, layers.packed_mask(positions, doc_ids=doc_ids).dense)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_model_compiles_to_one_graph_once_and_computes_the_same(name, as_on_cuda):
    """Logits, losses, statistics and gradients of three batches of other documents, multi-token prediction included."""
    model, backend = small_model(name), counter("aot_eager")
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    for seed in range(3):
        batch = packed_batch(seed)
        outcomes = []
        for forward in (model, compiled):
            _, loss, other_vars = forward(**batch)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            outcomes.append((loss, other_vars, [g for g in grads if g is not None]))
        torch.testing.assert_close(*outcomes, atol=1e-6, rtol=1e-4)
    assert backend.frame_count == 1
    assert flex_calls(backend) == 2 + len(getattr(model, "mtp", ()))


@pytest.mark.slow
@pytest.mark.parametrize("heads, groups, size, v_size", [(6, 2, 24, 24), (2, 2, 24, 16), (2, 1, 16, 32)])
def test_forward_compiled_by_inductor(heads, groups, size, v_size, as_on_cuda):
    """Values that are a view into a wider tensor made in the same program, as those of latent attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, TOKENS, *shape) for shape in ((heads, size), (groups, size), (groups, 3 * v_size)))

    def attend_view(q, k, v, doc_ids):
        return attend(q, k, v.tanh()[..., -v_size:], doc_ids)

    backend = counter("inductor")
    for seed in range(2):
        doc_ids = packed_batch(seed)["doc_ids"]
        with torch.no_grad():
            got = torch.compile(attend_view, dynamic=False, fullgraph=True, backend=backend)(q, k, v, doc_ids)
            torch.testing.assert_close(got, attend_view(q, k, v, doc_ids), atol=1e-5, rtol=1e-5)
    assert backend.frame_count == flex_calls(backend) == 1


@pytest.mark.slow
def test_a_model_that_interrupts_the_graph_computes_the_same(as_on_cuda):
    """Between the mask and its use: there a PackedMask is handed from one compiled part to the next."""
    window = (positions[0, :, None] - positions) < 7

    def interrupted(q, k, v, doc_ids):
        mask, own = layers.packed_mask(positions, doc_ids=doc_ids), layers.attention_mask(positions, doc_ids=doc_ids)
        torch._dynamo.graph_break()
        return layers.attention(q, k, v, mask), layers.attention(q, k, v, own & window)

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, TOKENS, 2, 16)
    for seed in range(2):
        doc_ids = packed_batch(seed)["doc_ids"]
        got = torch.compile(interrupted, dynamic=False, backend="aot_eager")(q, k, v, doc_ids)
        torch.testing.assert_close(got, interrupted(q, k, v, doc_ids), atol=1e-5, rtol=1e-5)
