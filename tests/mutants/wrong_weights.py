"""State that is not saved, failures under bf16 and torch.compile, and MoE models with wrong routing."""

import torch
from torch import nn

from .right import Attention, FeedForward, MoE, MoEModel, MoEModelArgs, RightModel, mutant, with_defaults

SAVED, TIED = "persistence.saved_weights_restore_the_model", "persistence.tied_weights_stay_tied"


@mutant(SAVED)
class RoutingBiasIsNotSaved(MoEModel):
    class FFN(MoE):
        def make_bias(self):
            self.register_buffer("routing_bias", torch.zeros(self.args.n_routed_experts), persistent=False)


@mutant(SAVED)
class LayersInAPythonList(RightModel):
    def make_layers(self):
        self.hidden = [*super().make_layers()]
        return self.hidden


@mutant(SAVED)
class ProjectionIsDrawnAtConstruction(RightModel):
    def make_more(self):
        self.features = torch.randn(self.args.dim, self.args.dim) / self.args.dim**0.5

    def head(self, x, state):
        return super().head(x @ self.features, state)


@mutant(SAVED)
class ScheduleIsAPythonFloat(RightModel):
    temperature = 2.0

    def before_step(self, step, total_steps):
        self.temperature = 2.0 - step / total_steps

    def head(self, x, state):
        return super().head(x, state) / self.temperature


@mutant("persistence.buffers_keep_their_precision")
class RoutingBiasInBf16(MoEModel):
    class FFN(MoE):
        def make_bias(self):
            self.register_buffer("routing_bias", torch.zeros(self.args.n_routed_experts, dtype=torch.bfloat16))


@mutant(TIED)
class TiesByData(RightModel):
    def make_more(self):
        self.lm_head.weight.data = self.tok_embed.weight.data


@mutant(TIED)
class TiesByCopying(RightModel):
    def init_weights(self):
        super().init_weights()
        with torch.no_grad():
            self.lm_head.weight.copy_(self.tok_embed.weight)


@mutant(TIED)
class UntiesOnLoading(RightModel):
    def make_more(self):
        self.lm_head.weight = self.tok_embed.weight

    def load_state_dict(self, state, *args, **kwargs):
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        return super().load_state_dict(state, *args, **kwargs)


@mutant("precision.bf16_stays_near_fp32")
class PositionsInTheTypeOfQueries(RightModel):
    class Attention(Attention):
        def turn(self, x, positions):
            half = self.args.head_dim // 2
            angles = positions[..., None].to(x.dtype) * 100.0 ** (-torch.arange(half) / half).to(x.dtype)
            cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@mutant("precision.bf16_stays_near_fp32")
class SumsInBf16(RightModel):
    """A running sum of 300 tokens in the type of the projection."""

    def forward(self, input_ids, targets=None):
        return super().forward(input_ids, targets)

    class FFN(FeedForward):
        def forward(self, x):
            h = self.up_proj(x)
            total = torch.zeros_like(h[:, 0])
            sums = []
            for t in range(h.shape[1]):
                total = total + h[:, t]
                sums.append(total)
            return self.down_proj((torch.stack(sums, dim=1) * 0.2).sin())


@mutant("learning.overfits_one_batch")
class OverflowsInHalf(RightModel):
    def head(self, x, state):
        return super().head(x, state).half().mul(3e4).float() / 3e4


@mutant("precision.compiled_equals_eager", slow=True)
class DependsOnTheStep(RightModel):
    step = 0

    def before_step(self, step, total_steps):
        self.step = step

    def losses(self, logits, targets, balances, other_vars):
        loss, other_vars = super().losses(logits, targets, balances, other_vars)
        warm = loss * 0.01 / (1 + self.step)
        return loss + warm, {**other_vars, "loss/warm": warm}


@mutant("moe.loads_are_counted")
class LoadsAreShares(MoEModel):
    class FFN(MoE):
        def count(self, chosen, scores):
            return super().count(chosen, scores) / chosen.numel()


@mutant("moe.loads_are_counted")
class LoadsCountTheBestOnly(MoEModel):
    class FFN(MoE):
        def count(self, chosen, scores):
            return super().count(chosen[:, :1], scores)


@mutant("moe.loads_leave_padding_out")
class LoadsCountPadding(MoEModel):
    class FFN(MoE):
        def without_padding(self, chosen, doc_ids):
            return chosen


@mutant("moe.loads_leave_padding_out")
class TakesDocumentZeroForPadding(MoEModel):
    class FFN(MoE):
        def without_padding(self, chosen, doc_ids):
            return chosen if doc_ids is None else chosen[doc_ids.flatten() > 0]


@mutant("moe.loads_leave_padding_out")
class PaddingOfTheFirstSequenceForAll(MoEModel):
    class FFN(MoE):
        def without_padding(self, chosen, doc_ids):
            return chosen if doc_ids is None else chosen[doc_ids[:1].expand_as(doc_ids).flatten() >= 0]


@mutant("moe.loads_leave_padding_out")
class CountsPaddingInOneLayer(MoEModel):
    def make_more(self):
        self.layers[-1].ffn.without_padding = lambda chosen, doc_ids: chosen


@mutant("moe.loads_are_true")
class LoadsCountedWithoutTheBias(MoEModel):
    class FFN(MoE):
        def count(self, chosen, scores):
            return super().count(scores.topk(self.args.n_activated_experts, dim=-1).indices, scores)


@mutant("moe.loads_are_true")
class LoadsInAnotherOrder(MoEModel):
    class FFN(MoE):
        def count(self, chosen, scores):
            return super().count(chosen, scores).flip(0)


@mutant("moe.routers_have_a_task_gradient")
class DetachesTheWeights(MoEModel):
    class FFN(MoE):
        def weigh(self, scores, chosen):
            return super().weigh(scores.detach(), chosen)


@mutant("moe.routers_have_a_task_gradient", with_defaults(MoEModelArgs, n_activated_experts=1))
class OneWeightDividedByItself(MoEModel):
    pass


@mutant("moe.bias_update_evens_the_load")
class BiasMovesTheWrongWay(MoEModel):
    class FFN(MoE):
        def update_bias(self, load):
            super().update_bias(-load)


@mutant("moe.bias_update_evens_the_load")
class BiasOfTheNextLayer(MoEModel):
    def after_step(self, other_vars):
        super().after_step({**other_vars, "moe/load": other_vars["moe/load"].flip(0, 1)})


@mutant("moe.bias_only_chooses")
class BiasInTheWeights(MoEModel):
    class FFN(MoE):
        def weigh(self, scores, chosen):
            return super().weigh(scores + self.routing_bias, chosen)


@mutant("moe.balance_loss_evens_the_load")
class BalanceLossHasTheWrongSign(MoEModel):
    class FFN(MoE):
        def balance(self, scores, chosen):
            return -super().balance(scores, chosen)


@mutant("moe.experts_differ")
class ExpertsAreCopies(MoEModel):
    def init_weights(self):
        super().init_weights()
        with torch.no_grad():
            for layer in self.layers:
                layer.ffn.up_proj.copy_(layer.ffn.up_proj[:1].expand_as(layer.ffn.up_proj))
