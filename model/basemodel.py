"""The contract between an architecture and the framework, complete: the one file a plugin author must read.

An architecture is a dataclass `MyNetModelArgs(BaseModelArgs)` and a class `MyNetModel(BaseModel)` in one file (see
template.py). `forward(input_ids, targets=None)` is required; `state` adds fast decoding, `doc_ids` packed documents.

Names that the framework reads, where a model has them:
    layers              nn.ModuleList of the repeated blocks, called as modules: units of `State`, sharding, diagnostics
    tok_embed, lm_head  the nn.Embedding of the vocabulary and the output head, whose weight may be the table
    o_proj, down_proj   projections into the residual stream, which `init_weights` scales down with depth
    expert_weights      of an MoE module: names of its stacks of experts, which decoding may quantize or pack
    not_quantized       of any module: names of its modules and stacks that int8 decoding leaves as they are
    scalar_params       of any module: names of parameters for the group "scalar" of `param_groups`
    sink, sinks         of an attention module: a score per head (H,), in the denominator of the softmax only
    dim, n_layers, ...  usual arguments: for default FLOPs; checks (checks/harness/tiny_args.py) and demos shrink them;
                        window_size counts the token itself; some checks read n_activated_experts, bias_update_speed
"""

import inspect
from dataclasses import dataclass, fields

import torch
from torch import nn

from model.hf import layout
from model.layers.state import State
from utils.errors import ModelError, require

MOE_LOAD = "moe/load"  # the key of other_vars with the tokens per expert, (L, E)


def is_expert_load(name, tensor):
    """Whether an entry of other_vars counts tokens per expert: 2-d, its last name begins with "load" (moe/load_mtp)."""
    return tensor.ndim == 2 and name.rpartition("/")[2].startswith("load")


@dataclass
class BaseModelArgs:
    """Architecture only: no learning rate, no batch size, no temperature. The framework sets both fields below."""

    vocab_size: int = 32000  # V, the tokenizer's size, special tokens included
    max_seq_len: int = 512  # the longest sequence, in tokens, that the model is built for

    def check_sizes(self, *may_be_zero):
        """Raise `ModelError` for an int below 1 (0 for the names given); call it first in `__post_init__`."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in may_be_zero or field.default == 0 else 1
            is_int = isinstance(field.default, int) and not isinstance(field.default, bool)
            require(not is_int or value >= least, f"{field.name}={value} must be at least {least}: change it")

    @classmethod
    def tiny(cls):
        """Return small arguments for checks and tests; None: the fields of the usual names are made small."""
        return None


class BaseModel(nn.Module):
    """Parent of every architecture. All but `forward` has a default that may be overridden."""

    model_name: str | None = None  # set it in the subclass, e.g. "mini_mynet"; this is what --model_name takes
    hf_layout = None  # a `Layout` of model/hf/ where transformers has the architecture too (docs/interchange.md)
    gradients_are_exact = True  # False: not the derivative of forward on purpose, e.g. straight-through rounding
    z_loss = 0.0  # set by the trainer: the weight of the term "loss/z", see `lm_loss`

    def __init__(self, args):
        super().__init__()
        self.args = args

    def forward(self, input_ids, targets=None):
        """Return `(logits, loss, other_vars)`. Every architecture writes this method.

        input_ids (B, T) int64. targets (B, T) int64, already shifted by one; -100 means no loss at that position.
        state: optional, a `State`; read `state.pos`, append T tokens to every sequence, leave `pos` alone.
        doc_ids (B, T) int64: optional; tokens of different documents must not see each other; -1 is padding.

        logits (B, T, V); may be None when targets are given, and (B, 1, V) when `state.last_only`.
        loss: None exactly when targets is None, else the mean over the valid targets (0 when there is none).
        other_vars: flat dict of tensors. `loss/<name>` are the weighted terms with their graph, whose sum is `loss`:
        `loss/ce`, the cross-entropy of the next token, for held-out loss and bits per character (else `loss`);
        `loss/z`, required when `self.z_loss` is set; a balance loss has balance, aux or load in its name, an index
        loss, which teaches an indexer alone, index. All else is detached and logged: 0-d as a scalar, 1-d, 2-d as a
        histogram per layer. Reserved: `moe/load` (L, E), `.../load...`: tokens per expert. Padding counts in none.
        Forward never writes to its inputs, stores nothing about a call on the module, and switches no mode. Training in
        bf16 holds the group "matrix" of `param_groups` in bf16: where autocast is off, use `weight.float()`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, input_ids, targets=None)")

    @classmethod
    def accepts(cls, parameter):
        """Return whether `forward` declares `parameter` ("state" or "doc_ids")."""
        return parameter in inspect.signature(cls.forward).parameters

    def before_step(self, step, total_steps):
        """Called before each optimizer step, for schedules of the model's own."""

    def after_step(self, other_vars):
        """Called once after each optimizer step with `other_vars` averaged over micro-batches and ranks.

        It may change persistent buffers in place and nothing else. After a skipped step they are restored.
        """

    draft = None
    """Optional: `draft(hidden, ids, state)` -> (logits (B, T, V), hidden (B, T, D)), used by --speculative=draft.

    hidden (B, T, D): the `state.hidden` of T tokens, set by forward; ids (B, T): the tokens after them. The logits
    predict the tokens after those. `state` is a second one of `init_state`, for drafts alone.
    """

    def init_weights(self):
        """Initialise all weights; call it last in `__init__`.

        Matrices ~ N(0, 0.02). The projections that write into the residual stream are divided by sqrt(2 L), so that
        its variance does not grow with depth (GPT-2, section 2.3). Embeddings ~ N(0, 0.02), biases 0, norms 1. Then a
        module that has a method `init_weights` sets its own parameters, those of another kind.
        """
        n_layers = len(getattr(self, "layers", ())) or 1
        for name, param in self.named_parameters():
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            if param.ndim >= 2:
                nn.init.normal_(param, std=0.02 / (2 * n_layers) ** 0.5 if residual else 0.02)
        for module in self.modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights()

    def param_groups(self):
        """Return {"matrix", "embed", "scalar"}: lists that hold every trainable parameter exactly once.

        matrix: weights of 2 or more dimensions that map activations (Muon, decayed); embed: embeddings and output head;
        scalar: norms, biases, other small vectors, and what a module names in `scalar_params`.
        """
        embed = {id(p) for p in [*self._tables(), *self._head()]}
        marked = {id(getattr(m, name)) for m in self.modules() for name in getattr(m, "scalar_params", ())}
        groups = {"matrix": [], "embed": [], "scalar": []}
        trained = [param for param in self.parameters() if param.requires_grad]
        for param in sorted(trained, key=lambda p: id(p) in marked):  # the marked ones last
            is_matrix = param.ndim >= 2 and id(param) not in marked
            groups["embed" if id(param) in embed else "matrix" if is_matrix else "scalar"].append(param)
        return groups

    def num_params(self):
        """Return counts {"total", "active" (that one token uses: a MoE overrides it), "embedding" (of tables)}."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "active": total, "embedding": sum(p.numel() for p in self._tables())}

    def attention_flops_per_token(self, seq_len):
        """Return the forward FLOPs per token of scores and values of all layers: 4 T H K per layer."""
        a = self.args
        width = getattr(a, "n_heads", 0) * getattr(a, "head_dim", 0)
        return 4 * seq_len * getattr(a, "n_layers", 0) * (width or getattr(a, "dim", 0))

    def flops_per_token(self, seq_len):
        """Return the training FLOPs per token: 3 x (2 x active matmul weights + full attention) (PaLM, appendix B)."""
        head = {id(p) for p in self._head()}
        lookup = sum(p.numel() for p in self._tables() if id(p) not in head)  # no matmul; a tied table is one
        return 3 * (2 * (self.num_params()["active"] - lookup) + self.attention_flops_per_token(seq_len))

    def _tables(self):
        return {id(m.weight): m.weight for m in self.modules() if isinstance(m, nn.Embedding)}.values()

    def _head(self):
        return [p for name, p in self.named_parameters(remove_duplicate=False) if name.startswith("lm_head.")]

    def init_state(self, batch_size, max_len=None):
        """Return an empty `State` for `batch_size` sequences of up to `max_len` tokens (default: `max_seq_len`)."""
        max_len = self.args.max_seq_len if max_len is None else max_len
        self._check_length("a state", max_len)
        pos = torch.zeros(batch_size, dtype=torch.long, device=next(self.parameters()).device)
        return State(pos, max_len, [{} for _ in getattr(self, "layers", ())])

    def check_length(self, input_ids):
        """Raise `ModelError` when `input_ids` (B, T) is longer than the model takes."""
        self._check_length("a sequence", input_ids.shape[1])

    def _check_length(self, what, n_tokens):
        if n_tokens > self.args.max_seq_len:
            raise ModelError(
                f"{what} of {n_tokens} tokens exceeds max_seq_len={self.args.max_seq_len} of {self.model_name}: "
                "shorten it, or train with a larger --max_seq_len"
            )

    def to_hf(self):
        """Return (config.json as a dict, {published name: fp32 tensor on the CPU}); ModelError without a layout."""
        return layout.to_hf(self)

    @classmethod
    def from_hf(cls, config, tensors, max_seq_len=0):
        """Return a model of a published config and {name: tensor}; ModelError names what is missing or left over."""
        return layout.from_hf(cls, config, tensors, max_seq_len)
