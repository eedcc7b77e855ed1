"""The smallest complete architecture, explained line by line. Copy it, rename it, change it.

    python -m model.new my_net                       # copies it to model/my_net.py, renamed
    python check_model.py --model_name=mini_my_net
    python pretrain.py --model_name=mini_my_net

This file itself is not registered: discovery skips it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from model.basemodel import BaseModel, BaseModelArgs
from model.layers import RMSNorm, lm_loss


# The shape of the network and nothing else. `vocab_size` and `max_seq_len` are inherited: the framework sets them from
# the tokenizer and from --max_seq_len. Each field is a flag at once: --model.dim=512.
@dataclass
class TemplateModelArgs(BaseModelArgs):
    dim: int = 256
    n_layers: int = 4


# A block that mixes tokens by a running mean of the past and then works on each token by itself. Replace it by your
# idea. The one rule: the output at a position may depend on that position and earlier ones, never on later ones.
class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.mix_norm = RMSNorm(args.dim)
        self.mix_proj = nn.Linear(args.dim, args.dim, bias=False)
        self.ffn_norm = RMSNorm(args.dim)
        self.up_proj = nn.Linear(args.dim, 4 * args.dim, bias=False)
        self.down_proj = nn.Linear(4 * args.dim, args.dim, bias=False)

    def forward(self, x):  # (B, T, D)
        seen = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]  # (T, 1), how many tokens the mean is over
        x = x + self.mix_proj(self.mix_norm(x)).cumsum(dim=1) / seen
        return x + self.down_proj(self.up_proj(self.ffn_norm(x)).relu().square())


class TemplateModel(BaseModel):
    model_name = "template"  # what --model_name takes: [a-z0-9_]{1,64}

    def __init__(self, args):
        super().__init__(args)  # keeps self.args
        self.tok_embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))  # repeated blocks: always self.layers
        self.norm = RMSNorm(args.dim)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.init_weights()  # last: sensible defaults for every module above

    def attention_flops_per_token(self, seq_len):
        return 0  # the default assumes attention in every layer, and there is none; delete this when you add some

    # Accepting `state` would add fast decoding, accepting `doc_ids` packed documents; both can come later.
    def forward(self, input_ids, targets=None):
        self.check_length(input_ids)
        x = self.tok_embed(input_ids)  # (B, T) -> (B, T, D)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if targets is None:  # inference: logits, no loss
            return self.lm_head(x), None, {}
        # Training: `targets` is already shifted, -100 means no loss there. `lm_loss` never builds all the logits.
        loss = lm_loss(x, self.lm_head.weight, targets)
        # Whatever else you return here appears in TensorBoard. The terms under "loss/" must sum to the loss.
        return None, loss, {"loss/ce": loss, "stream/rms": x.detach().square().mean().sqrt()}
