"""A tiny model with everything the trainer cares about."""

from dataclasses import dataclass

import torch
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs


@dataclass
class TinyModelArgs(BaseModelArgs):
    dim: int = 16
    tied: bool = False
    dropout: float = 0.0


class TinyModel(BaseModel):
    """An embedding, a causal mean over the document, two mixing layers; a buffer that after_step moves; a statistic."""

    model_name = "tiny"

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList([nn.Linear(args.dim, args.dim) for _ in range(2)])
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tied:
            self.lm_head.weight = self.tok_embed.weight
        self.unused = nn.Parameter(torch.ones(3))  # a plugin may leave a parameter out of its graph
        self.register_buffer("bias", torch.zeros(4))
        self.init_weights()

    def forward(self, input_ids, targets=None, doc_ids=None):
        x = self.tok_embed(input_ids)  # (B, T, D)
        mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril().expand(x.shape[0], -1, -1)
        if doc_ids is not None:
            mask = mask * (doc_ids[:, :, None] == doc_ids[:, None, :])
        x = x + (mask / mask.sum(-1, keepdim=True)) @ x
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), self.args.dropout, self.training)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None, {}
        valid = (targets != -100).sum().clamp(min=1)
        ce = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / valid
        extra = 0.01 * x.float().square().mean()
        load = x.detach().float().mean((0, 1))[:4]
        return None, ce + extra, {"loss/ce": ce, "loss/extra": extra, "moe/load": load.expand(2, 4)}

    def after_step(self, other_vars):
        self.bias += 0.01 * torch.sign(other_vars["moe/load"].mean(0))
