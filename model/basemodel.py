"""The contract between an architecture and the framework: the one file a plugin author must read.

An architecture is a dataclass `MyNetModelArgs(BaseModelArgs)` and a class `MyNetModel(BaseModel)` in one file of this
folder. `forward(input_ids, targets=None)` is all that is required; `template.py` shows the smallest complete example.
What the framework offers on top is switched on by *accepting a parameter* in `forward`: `state` gives fast decoding,
`doc_ids` lets several documents share a row without seeing each other.
"""

import inspect
from dataclasses import dataclass, fields

import torch
from torch import nn

from model.layers.state import State
from utils.errors import ModelError


MOE_LOAD = "moe/load"


@dataclass
class BaseModelArgs:
    """Architecture only: no learning rate, no batch size, no temperature. The framework sets both fields below."""

    vocab_size: int = 32000  # V, the tokenizer's size, special tokens included
    max_seq_len: int = 512  # the longest sequence, in tokens, that the model is built for

    def check_sizes(self, *may_be_zero):
        """Raise `ModelError` for a whole number below 1 (0 for the names given); call it first in `__post_init__`."""
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in may_be_zero or field.default == 0 else 1
            if isinstance(field.default, int) and not isinstance(field.default, bool) and value < least:
                raise ModelError(f"{field.name}={value} must be at least {least}: change it")


class BaseModel(nn.Module):
    """Parent of every architecture. See `forward` for the contract; all else has a default that may be overridden.

    Convention: the repeated blocks stand in `self.layers`, an `nn.ModuleList`.
    """

    model_name = None  # set it in the subclass, e.g. "mini_mynet"; this is what --model_name takes
    hf_layout = None  # a `Layout` of hf.py where transformers has the architecture too (docs/interchange.md)

    z_loss = 0.0

    def __init__(self, args):
        super().__init__()
        self.args = args

    def forward(self, input_ids, targets=None):
        """Return `(logits, loss, other_vars)`. Every architecture writes this method.

        input_ids (B, T) int64. targets (B, T) int64, already shifted by one; -100 means no loss at that position.
        state: optional, a `State`; read `state.pos`, append T tokens to every row, leave `pos` alone.
        doc_ids (B, T) int64: optional; tokens of different documents in one row must not see each other;
        -1 is padding, which a count of tokens leaves out.

        logits (B, T, V); may be None when targets are given, and (B, 1, V) when `state.last_only`.
        loss: None exactly when targets is None, else the mean over the valid targets (0 when there is none).
        other_vars: dict of tensors. `loss/<name>` are the weighted terms, whose sum is `loss`; they keep their graph.
        All else is detached and goes to TensorBoard as it stands: 0-d as a scalar, 1-d and 2-d as a histogram a row.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, input_ids, targets=None)")

    @classmethod
    def accepts(cls, parameter):
        """Return whether `forward` declares `parameter` ("state" or "doc_ids")."""
        return parameter in inspect.signature(cls.forward).parameters

    # ---------------------------------------------------------------- hooks

    def before_step(self, step, total_steps):
        """Called before each optimizer step: the place for schedules of the model's own."""

    def after_step(self, other_vars):
        """Called once after each optimizer step with `other_vars` averaged over micro-batches and ranks."""

    after_step_keeps_to_buffers = False
    """Say True where `after_step` moves saved buffers by operations on their device, and nothing else. Then training
    need not wait: it is called after a step, too, that turns out not to be taken, and the buffers get their values
    back.
    """

    # ---------------------------------------------------------------- optional

    draft = None
    """`draft(hidden, ids, state)` -> (logits (B, T, V), hidden (B, T, D)): what the model guesses one token further.

    hidden (B, T, D): the `state.hidden` of T tokens; ids (B, T): the tokens that followed them. The logits are of the
    token after those. `state` is a second one of `init_state`, for drafts alone. With it, generation speculates: the
    model reads a guess together with the token before it, and keeps it if it would have written it.
    """

    # ---------------------------------------------------------------- free for every model, open to override

    def init_weights(self):
        """Initialise all weights; call it last in `__init__`.

        Matrices ~ N(0, 0.02). The projections that write into the residual stream are divided by sqrt(2 L), so that
        its variance does not grow with depth (GPT-2, section 2.3). Embeddings ~ N(0, 0.02), biases 0, norms 1.
        """
        n_layers = len(getattr(self, "layers", ())) or 1
        for name, param in self.named_parameters():
            if param.ndim < 2:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            nn.init.normal_(param, std=0.02 / (2 * n_layers) ** 0.5 if residual else 0.02)

    def param_groups(self):
        """Return {"matrix", "embed", "scalar"}: lists that hold every trainable parameter exactly once.

        matrix: weights of 2 or more dimensions that map activations (Muon's, decayed); embed: embeddings and the
        output head; scalar: norms, biases and other small vectors.
        """
        embed = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        if isinstance(getattr(self, "lm_head", None), nn.Module):
            embed |= {id(p) for p in self.lm_head.parameters()}
        groups = {"matrix": [], "embed": [], "scalar": []}
        for param in self.parameters():
            if param.requires_grad:
                kind = "embed" if id(param) in embed else "matrix" if param.ndim >= 2 else "scalar"
                groups[kind].append(param)
        return groups

    def num_params(self):
        """Return counts {"total", "active", "embedding"}: all, those that one token uses, those of embedding tables.

        A mixture of experts overrides this to count only the chosen experts as active.
        """
        total = sum(p.numel() for p in self.parameters())
        embedding = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return {"total": total, "active": total, "embedding": embedding}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs a token spends in scores and values of all layers: 4 T H K a layer."""
        a = self.args
        n_layers, width = getattr(a, "n_layers", 0), getattr(a, "n_heads", 0) * getattr(a, "head_dim", 0)
        return 4 * seq_len * n_layers * (width or getattr(a, "dim", 0))

    def flops_per_token(self, seq_len):
        """Return the FLOPs of training on one token at `seq_len`: 3 x forward, forward = 2 x active matmul weights
        + attention over the full square, causality not counted (PaLM, appendix B).
        """
        counts = self.num_params()
        tied = any(
            p is m.weight
            for m in self.modules()
            if isinstance(m, nn.Embedding)
            for p in getattr(self, "lm_head", nn.Module()).parameters()
        )
        lookup = 0 if tied else counts["embedding"]  # a lookup is no matmul; a tied table is one, in the head
        return 3 * (2 * (counts["active"] - lookup) + self.attention_flops_per_token(seq_len))

    def init_state(self, batch_size, max_len=None):
        """Return an empty `State` for `batch_size` rows with room for `max_len` tokens (default: `max_seq_len`)."""
        max_len = self.args.max_seq_len if max_len is None else max_len
        if max_len > self.args.max_seq_len:
            raise ModelError(
                f"a state of {max_len} tokens exceeds max_seq_len={self.args.max_seq_len} of {self.model_name}: "
                "ask for less, or train with a larger --max_seq_len"
            )
        device = next(self.parameters()).device
        pos = torch.zeros(batch_size, dtype=torch.long, device=device)
        return State(pos, max_len, [{} for _ in getattr(self, "layers", ())])

    def check_length(self, input_ids):
        """Raise `ModelError` when `input_ids` (B, T) is longer than the model takes."""
        if input_ids.shape[1] > self.args.max_seq_len:
            raise ModelError(
                f"a sequence of {input_ids.shape[1]} tokens exceeds max_seq_len={self.args.max_seq_len} of "
                f"{self.model_name}: shorten it, or train with a larger --max_seq_len"
            )

    # ---------------------------------------------------------------- to the published layout and back

    def to_hf(self):
        """Return `(config, tensors)`: what config.json says and {published name: tensor}, fp32 copies on the CPU.

        Raises `ModelError` for an architecture without an `hf_layout`, or one that transformers cannot hold.
        """
        return self._layout().config(self.args), self._layout().tensors(self)

    @classmethod
    def from_hf(cls, config, tensors):
        """Return a model built from a published config and {name: tensor}, a mapping that may read lazily.

        Raises `ModelError` that names what the architecture cannot do, or the tensor that is missing or left over.
        """
        layout = cls._layout()
        model = cls(layout.model_args(layout.present(config, tensors)))
        layout.load(model, tensors)
        return model

    @classmethod
    def _layout(cls):
        if cls.hf_layout is None:
            raise ModelError(
                f"{cls.model_name} has no published layout, so transformers cannot hold it: give {cls.__name__} an "
                "hf_layout (docs/interchange.md)"
            )
        return cls.hf_layout
