"""Gradients that are rounding, weights reached in part, backward passes that are random or right for a while."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .right import (
    Attention,
    Block,
    FeedForward,
    MoE,
    MoEModel,
    MoEModelArgs,
    RightModel,
    WithoutAttention,
    mutant,
    with_defaults,
)
from .unusual import ChunkedRecurrence, GatedRecurrence

LEARNS = "gradients.every_parameter_learns"
AGREES = "gradients.agree_with_finite_differences"
REPEATS = "gradients.backward_is_deterministic"
OneExpertArgs = with_defaults(MoEModelArgs, n_activated_experts=1)


# ------------------------------------------------------------------- the gradient is rounding


@mutant(LEARNS)
class BiasOfKeysWithoutPositions(RightModel):
    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.k_bias = nn.Parameter(torch.zeros(args.head_dim))

        def turn(self, x, positions):
            return x

        def mix(self, q, k, v, visible):
            return super().mix(q, k + self.k_bias, v, visible)


@mutant(LEARNS)
class ScalesWhatANormCancels(RightModel):
    def make_more(self):
        self.scale = nn.Parameter(torch.ones(()))

    def head(self, x, state):
        return super().head(self.scale * x, state)


@mutant(LEARNS, slow=True)
class ScalesHeadsBeforeTheirNorm(RightModel):
    """A norm by hand, whose epsilon leaves a gradient of 1e-6."""

    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.temperature = nn.Parameter(torch.ones(args.n_heads, 1))

        def mix(self, q, k, v, visible):
            q = q * self.temperature
            return super().mix(q * (q.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt(), k, v, visible)


@mutant(LEARNS, slow=True)
class ShiftsWhatALayerNormCentres(RightModel):
    def make_more(self):
        self.norm = nn.LayerNorm(self.args.dim)
        self.shift = nn.Parameter(torch.zeros(()))

    def head(self, x, state):
        return super().head(x + self.shift, state)


@mutant(LEARNS, slow=True)
class ShiftsAllLogits(RightModel):
    def make_more(self):
        self.shift = nn.Parameter(torch.zeros(()))

    def head(self, x, state):
        return super().head(x, state) + self.shift


@mutant(LEARNS, slow=True)
class MultipliesByZero(RightModel):
    def make_more(self):
        self.more = nn.Parameter(torch.ones(self.args.dim))

    def head(self, x, state):
        return super().head(x + 0 * self.more, state)


@mutant(LEARNS, slow=True)
class NormalisesOneNumber(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.gate = nn.Linear(args.dim, 1)

        def forward(self, x):
            return super().forward(x) * F.normalize(self.gate(x), dim=-1)


@mutant(LEARNS, OneExpertArgs, slow=True)
class OneWeightDividedByItselfWithoutBalance(MoEModel):
    def losses(self, logits, targets, balances, other_vars):
        return super().losses(logits, targets, [], other_vars)


@mutant("moe.routers_have_a_task_gradient", OneExpertArgs)
class OneWeightDividedByItselfWithoutLoads(MoEModel):
    def losses(self, logits, targets, balances, other_vars):
        return super().losses(logits, targets, balances, {})

    def after_step(self, other_vars):
        pass


# ------------------------------------------------------------------- a part is never reached


@mutant(LEARNS)
class ReadsHalfOfItsPositions(RightModel):
    def make_more(self):
        self.pos_embed = nn.Embedding(self.args.max_seq_len, self.args.dim)

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids) + self.pos_embed(positions // 2)


@mutant(LEARNS, slow=True)
class TableOfTwiceTheVocabulary(RightModel):
    def make_more(self):
        self.tok_embed = nn.Embedding(2 * self.args.vocab_size, self.args.dim)


@mutant(LEARNS, slow=True)
class ExpertsUseHalfTheirWidth(MoEModel):
    class FFN(MoE):
        def expert(self, tokens, number):
            return F.silu(tokens @ self.up_proj[number, :10].T) @ self.down_proj[number, :, :10].T


@mutant(LEARNS)
class OneExpertUsesHalfItsWidth(MoEModel):
    class FFN(MoE):
        def expert(self, tokens, number):
            width = 10 if number == 2 else 20
            return F.silu(tokens @ self.up_proj[number, :width].T) @ self.down_proj[number, :, :width].T


@mutant(LEARNS)
class FirstTapOfAConvolutionIsUnused(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.conv = nn.Conv1d(args.inter_dim, args.inter_dim, 4, groups=args.inter_dim)

        def forward(self, x):
            h = F.pad(self.up_proj(x).transpose(1, 2), (2, 0))
            h = F.conv1d(h, self.conv.weight[..., 1:], self.conv.bias, groups=self.conv.groups)
            return self.down_proj(F.silu(h.transpose(1, 2)))


@mutant(LEARNS, slow=True)
class ReadsHalfOfAMatrix(RightModel):
    def make_more(self):
        self.mixer = nn.Parameter(torch.empty(self.args.dim, self.args.dim))

    def head(self, x, state):
        return super().head(x + x[..., :16] @ self.mixer[:16], state)


@mutant(LEARNS, slow=True)
class LastHeadHasNoScale(RightModel):
    class Attention(Attention):
        def __init__(self, args, layer):
            super().__init__(args, layer)
            self.scale = nn.Parameter(torch.ones(args.n_heads, args.head_dim))

        def mix(self, q, k, v, visible):
            out = super().mix(q, k, v, visible)
            return torch.cat((out[:, :, :-1] * self.scale[:-1], out[:, :, -1:]), dim=2)


# ------------------------------------------------------------------- right for one chunk, or in eval mode


@mutant(AGREES, slow=True)
class DetachesBetweenChunks(WithoutAttention):
    class Attention(ChunkedRecurrence):
        def chunk(self, q, k, v, log_decay, memory):
            return super().chunk(q, k, v, log_decay, memory.detach())


@mutant(AGREES, slow=True)
class DetachesItsMemoryInTraining(WithoutAttention):
    class Attention(GatedRecurrence):
        def carry(self, memory, t):
            return memory.detach() if self.training and t % 16 == 15 else memory


class _FirstChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat((grad[:, :256], 0.5 * grad[:, 256:]), dim=1)


@mutant(AGREES, slow=True)
class BackwardOfTheFirst256Tokens(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return _FirstChunk.apply(super().forward(x))


@mutant(AGREES)
class DetachesOldKeys(RightModel):
    class Attention(Attention):
        def mix(self, q, k, v, visible):
            return super().mix(q, torch.cat((k[:, :-64].detach(), k[:, -64:]), dim=1), v, visible)


@mutant(AGREES, slow=True)
class DetachesTheResidualInTraining(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            stream = x.detach() if self.training else x
            x = stream + self.attn(self.attn_norm(x), positions, state, doc_ids)
            return (x + self.ffn(self.ffn_norm(x)),)


class _RoundsInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.8 * grad if grad.dtype == torch.float32 else grad


@mutant(AGREES)
class BackwardIsWrongInFp32(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return _RoundsInFp32.apply(super().forward(x))


# ------------------------------------------------------------------- two backward passes differ


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 0.1 * grad.norm() * torch.randn_like(grad) / grad.numel() ** 0.5


class _Counting(_Noisy):
    calls = 0

    @staticmethod
    def backward(ctx, grad):
        _Counting.calls += 1
        return (1 + 0.1 * (_Counting.calls % 3)) * grad


class _WritesToWhatItKept(_Noisy):
    @staticmethod
    def forward(ctx, x):
        ctx.scale = torch.ones(())
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        scale = ctx.scale.clone()
        ctx.scale *= 0.9
        return scale * grad


def through(function):
    class Through(FeedForward):
        def forward(self, x):
            return function.apply(super().forward(x))

    return Through


@mutant(REPEATS)
class BackwardDrawsNoise(RightModel):
    FFN = through(_Noisy)


@mutant(REPEATS)
class BackwardCountsItsCalls(RightModel):
    FFN = through(_Counting)


@mutant(REPEATS)
class BackwardWritesToWhatItKept(RightModel):
    FFN = through(_WritesToWhatItKept)


@mutant(REPEATS)
class RecomputesWithOtherNoise(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            return checkpoint(self.drop, x, use_reentrant=False, preserve_rng_state=False)

        def drop(self, x):
            return F.dropout(super().forward(x), 0.2)
