"""Missing or wrong gradients, bad initialisation, parameters listed or counted wrongly."""

import torch
from torch import nn

from .right import Attention, Block, FeedForward, MoE, MoEModel, RightModel, mutant

LEARNS = "gradients.every_parameter_learns"


@mutant(LEARNS)
class HasAParameterTooMany(RightModel):
    def make_more(self):
        self.forgotten = nn.Parameter(torch.ones(3))


@mutant(LEARNS)
class DetachesKeys(RightModel):
    class Attention(Attention):
        def mix(self, q, k, v, visible):
            return super().mix(q, k.detach(), v, visible)


@mutant(LEARNS)
class RoutingBiasIsAParameter(MoEModel):
    class FFN(MoE):
        def make_bias(self):
            self.routing_bias = nn.Parameter(torch.zeros(self.args.n_routed_experts))


@mutant(LEARNS)
class LastExpertIsNeverChosen(MoEModel):
    class FFN(MoE):
        def choose(self, scores):
            return super().choose(scores - torch.tensor([0.0] * 5 + [9.0]))


@mutant(LEARNS)
class TwoFactorsStartAtZero(RightModel):
    def make_more(self):
        self.a, self.b = nn.Parameter(torch.empty(4, self.args.dim)), nn.Parameter(torch.empty(self.args.dim, 4))

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)

    def head(self, x, state):
        return super().head(x + x @ self.a.T @ self.b.T, state)


@mutant(LEARNS)
class ReadsHalfOfItsFeedForward(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            h = self.up_proj(x).sigmoid()
            return self.down_proj(torch.cat((h[..., :24], torch.zeros_like(h[..., 24:])), dim=-1))


@mutant(LEARNS)
class GateIsRounded(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.gate = nn.Linear(args.dim, 1)

        def forward(self, x):
            return super().forward(x) * (self.gate(x) > 0)


@mutant("gradients.agree_with_finite_differences")
class DetachesTheResidual(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            x = x.detach() + self.attn(self.attn_norm(x), positions, state, doc_ids)
            return (x + self.ffn(self.ffn_norm(x)),)


@mutant("gradients.agree_with_finite_differences")
class DetachesTheNormaliser(MoEModel):
    class FFN(MoE):
        def weigh(self, scores, chosen):
            weights = scores.gather(1, chosen)
            return weights / weights.detach().sum(dim=-1, keepdim=True)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@mutant("gradients.agree_with_finite_differences")
class BackwardIsTwiceTooLarge(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return _Double.apply(super().forward(x))


@mutant("gradients.norms_per_layer")
class AddsTheStreamTwice(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            x = x + x + self.attn(self.attn_norm(x), positions, state, doc_ids)
            return (x + self.ffn(self.ffn_norm(x)),)


@mutant("gradients.norms_per_layer")
class HasNoResidual(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):
            x = self.attn(self.attn_norm(x), positions, state, doc_ids)
            return (self.ffn(x),)


@mutant("gradients.norms_per_layer")
class WeightsStartTooLarge(RightModel):
    class Block(Block):
        def forward(self, x, positions, state, doc_ids):  # and no norm that would catch it
            x = x + self.attn(x, positions, state, doc_ids)
            return (x + self.ffn(x),)

    def init_weights(self):
        for param in self.parameters():
            nn.init.normal_(param, std=0.5) if param.ndim > 1 else nn.init.ones_(param)
        nn.init.normal_(self.lm_head.weight, std=0.02)


@mutant("init.loss_is_uniform")
class TiedTableOfStandardDeviationOne(RightModel):
    def init_weights(self):
        super().init_weights()
        nn.init.normal_(self.tok_embed.weight)
        self.lm_head.weight = self.tok_embed.weight


@mutant("init.logits_are_centred")
class HeadPrefersSomeTokens(RightModel):
    def make_more(self):
        self.head_bias = nn.Parameter(torch.randn(self.args.vocab_size))

    def head(self, x, state):
        return super().head(x, state) + self.head_bias


@mutant("learning.overfits_one_batch")
class CapsItsLogitsTightly(RightModel):
    def head(self, x, state):
        return 0.5 * super().head(x, state).tanh()


@mutant("learning.overfits_one_batch")
class ClimbsInsteadOfDescending(RightModel):
    def cross_entropy(self, logits, targets):
        loss = super().cross_entropy(logits, targets)
        return 2 * loss.detach() - loss


@mutant("counts.parameter_groups_cover_all")
class GroupsMissTheNorms(RightModel):
    def param_groups(self):
        return {**super().param_groups(), "scalar": []}


@mutant("counts.parameter_groups_cover_all")
class GroupsListTheTiedTableTwice(RightModel):
    def make_more(self):
        self.lm_head.weight = self.tok_embed.weight

    def param_groups(self):
        groups = super().param_groups()
        return {**groups, "embed": [self.tok_embed.weight, self.lm_head.weight]}


@mutant("counts.parameter_groups_cover_all")
class VectorsAmongTheMatrices(RightModel):
    def param_groups(self):
        groups = super().param_groups()
        return {"embed": groups["embed"], "matrix": groups["matrix"] + groups["scalar"], "scalar": []}


@mutant("counts.parameters_are_counted")
class CountsTheTiedTableTwice(RightModel):
    def make_more(self):
        self.lm_head.weight = self.tok_embed.weight

    def num_params(self):
        counts = super().num_params()
        return {**counts, "total": counts["total"] + counts["embedding"]}


@mutant("counts.parameters_are_counted")
class CountsAllExpertsAsActive(MoEModel):
    def num_params(self):
        return RightModel.num_params(self)


@mutant("counts.flops_are_estimated")
class CountsForwardOnly(RightModel):
    def flops_per_token(self, seq_len):
        return super().flops_per_token(seq_len) // 3


@mutant("counts.flops_are_estimated")
class CountsAMultiplyAddAsOne(RightModel):
    def flops_per_token(self, seq_len):
        return super().flops_per_token(seq_len) // 2


@mutant("counts.flops_are_estimated")
class ForgetsAttentionsFlops(RightModel):
    def attention_flops_per_token(self, seq_len):
        return 0


@mutant("learning.one_step_moves_every_group")
class ListsCopiesOfItsNorms(RightModel):
    def param_groups(self):
        groups = super().param_groups()
        return {**groups, "scalar": [nn.Parameter(p.detach().clone()) for p in groups["scalar"]]}


class _Careless(_Double):
    @staticmethod
    def backward(ctx, grad):
        return grad.abs() if grad.dtype == torch.bfloat16 else grad


@mutant("precision.bf16_gradients_are_finite")
class LosesTheSignInItsBf16Backward(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return _Careless.apply(super().forward(x))


@mutant("precision.bf16_gradients_are_finite")
class Fp32GateDoesNotCastItsMatrix(RightModel):
    def make_more(self):
        self.gate = nn.Parameter(torch.zeros(self.args.dim, 1))

    def head(self, x, state):
        with torch.autocast(x.device.type, enabled=False):
            return super().head(x * (x.float() @ self.gate).sigmoid(), state)
