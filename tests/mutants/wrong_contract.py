"""Forward that returns the wrong form, stores something, writes to its inputs, or is random in eval mode."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .right import Attention, FeedForward, MoE, MoEModel, RightModel, RightModelArgs, mutant

SWITCHES = "contract.nothing_is_switched"


class Overridden(RightModel):
    """A base for mutants that wrap forward."""

    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        return self.after(*super().forward(self.before(input_ids, targets), targets, state, doc_ids))

    def before(self, input_ids, targets):
        return input_ids

    def after(self, *out):
        return out


@mutant("contract.shapes")
class ReturnsTwoValues(Overridden):
    def after(self, logits, loss, other_vars):
        return logits, loss


@mutant("contract.shapes")
class SqueezesABatchOfOne(Overridden):
    def after(self, logits, loss, other_vars):
        return logits.squeeze(0), loss, other_vars


@mutant("contract.shapes")
class CrashesOnOneToken(Overridden):
    def before(self, input_ids, targets):
        return input_ids[:, : input_ids.shape[1] + len(input_ids[0, 1:].max(dim=0, keepdim=True).values) - 1]


@mutant("contract.shapes")
class HeadIsPadded(RightModel):
    def make_more(self):
        self.lm_head = nn.Linear(self.args.dim, 128, bias=False)


@mutant("contract.eval_is_deterministic")
class DropoutInEval(RightModel):
    class FFN(FeedForward):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1)


@mutant("contract.eval_is_deterministic")
class NoisyRouter(MoEModel):
    class FFN(MoE):
        def choose(self, scores):
            return super().choose(scores + 0.1 * torch.randn_like(scores))


@mutant("contract.nothing_is_modified")
class WritesToTheInput(Overridden):
    def before(self, input_ids, targets):
        input_ids[:, 0] = 0
        return input_ids


@mutant("contract.nothing_is_modified")
class WritesToTheTargets(Overridden):
    def before(self, input_ids, targets):
        if targets is not None:
            targets[:, 0] = -100
        return input_ids


@mutant("contract.nothing_is_modified")
class CountsTokensInForward(MoEModel):
    class FFN(MoE):
        def count(self, chosen, scores):
            self.routing_bias += 1e-3 * torch.bincount(chosen.flatten(), minlength=6)
            return super().count(chosen, scores)


@mutant("contract.nothing_is_modified")
class BatchStatisticsInEval(RightModel):
    class FFN(FeedForward):
        def __init__(self, args):
            super().__init__(args)
            self.register_buffer("scale", torch.ones(args.dim))

        def forward(self, x):
            if self.training:
                self.scale.lerp_(x.detach().square().mean(dim=(0, 1)), 0.01)
            return super().forward(x / self.scale)


@mutant("contract.nothing_is_stored")
class KeepsItsMask(RightModel):
    class Attention(Attention):
        mask = None

        def visible(self, positions, n_keys, state, doc_ids):
            if self.mask is None or self.mask.shape[-1] != n_keys or state is not None or doc_ids is not None:
                self.mask = super().visible(positions, n_keys, state, doc_ids)
            return self.mask


@mutant("contract.nothing_is_stored")
class LeavesItsLossOnTheModule(MoEModel):
    class FFN(MoE):
        def balance(self, scores, chosen):
            self.last_balance = super().balance(scores, chosen)
            return self.last_balance


@mutant("contract.nothing_is_stored")
class CountsItsCalls(RightModel):
    calls = 0

    def head(self, x, state):
        self.calls += 1
        return super().head(x, state)


@mutant("contract.nothing_is_stored")
class GrowsAList(RightModel):
    def make_more(self):
        self.norms = []

    def head(self, x, state):
        self.norms.append(x.norm().item())
        return super().head(x, state)


@mutant(SWITCHES)
class FreezesItsTable(RightModel):
    def embed(self, input_ids, positions, targets, doc_ids):
        self.tok_embed.weight.requires_grad_(False)
        return super().embed(input_ids, positions, targets, doc_ids)


@mutant(SWITCHES)
class ThawsItsTableWithTargets(RightModel):
    def make_more(self):
        self.frozen = nn.Embedding(self.args.vocab_size, self.args.dim).requires_grad_(False)

    def embed(self, input_ids, positions, targets, doc_ids):
        self.frozen.requires_grad_(targets is not None)
        return self.tok_embed(input_ids) + self.frozen(input_ids)


@mutant(SWITCHES)
class PutsItsNormInEvalMode(RightModel):
    def head(self, x, state):
        self.norm.eval()
        return super().head(x, state)


@mutant(SWITCHES)
class LeavesEvalMode(RightModel):
    def head(self, x, state):
        self.lm_head.train()
        return super().head(x, state)


@mutant(SWITCHES)
class SwitchesGradientsOn(RightModel):
    def head(self, x, state):
        torch.set_grad_enabled(True)
        return super().head(x, state)


@mutant(SWITCHES)
class SetsTheDefaultType(RightModel):
    def head(self, x, state):
        torch.set_default_dtype(torch.float64)
        return super().head(x, state)


@mutant(SWITCHES)
class RegistersAHookInEveryCall(RightModel):
    def head(self, x, state):
        self.norm.register_forward_hook(lambda *call: None)
        return super().head(x, state)


@mutant(SWITCHES)
class ReplacesAParameterInForward(RightModel):
    def head(self, x, state):
        self.norm.weight = nn.Parameter(self.norm.weight.detach().clone())
        return super().head(x, state)


@mutant(SWITCHES)
class DrawsNoiseThatItDoesNotUse(RightModel):
    def head(self, x, state):
        noise = torch.randn_like(x)
        return super().head(x + noise if self.training else x, state)


@mutant(SWITCHES)
class DrawsFromPythonInEvalMode(RightModel):
    def head(self, x, state):
        dropped = random.random() < 0.1
        return super().head(0.9 * x if dropped and self.training else x, state)


@mutant("contract.longer_than_max_seq_len")
class ClampsPositions(RightModel):
    def make_more(self):
        self.pos_embed = nn.Embedding(self.args.max_seq_len, self.args.dim)

    def check_length(self, input_ids):
        pass

    def embed(self, input_ids, positions, targets, doc_ids):
        return self.tok_embed(input_ids) + self.pos_embed(positions.clamp(max=self.args.max_seq_len - 1))


@mutant("contract.longer_than_max_seq_len")
class CutsTheInput(Overridden):
    def before(self, input_ids, targets):
        return input_ids[:, -self.args.max_seq_len :]


@mutant("contract.train_equals_eval")
class DropsTokensInTraining(MoEModel):
    class FFN(MoE):
        def weigh(self, scores, chosen):
            weights = super().weigh(scores, chosen)
            return weights * (torch.arange(len(weights)) % 3 > 0)[:, None] if self.training else weights


@mutant("contract.after_step_moves_buffers_only")
class ClipsItsHeadAfterTheStep(RightModel):
    def after_step(self, other_vars):
        self.lm_head.weight.data.clamp_(-0.1, 0.1)


@mutant("contract.after_step_moves_buffers_only")
class CountsItsSteps(RightModel):
    steps = 0

    def after_step(self, other_vars):
        self.steps += 1


@mutant("contract.after_step_moves_buffers_only")
class MovesABufferThatIsNotSaved(RightModel):
    def make_more(self):
        self.register_buffer("mean_loss", torch.zeros(()), persistent=False)

    def after_step(self, other_vars):
        self.mean_loss.lerp_(other_vars["loss/ce"].detach(), 0.1)


@mutant("contract.after_step_moves_buffers_only")
class HalvesTheTypeOfItsBuffer(MoEModel):
    def after_step(self, other_vars):
        super().after_step(other_vars)
        for layer in self.layers:
            layer.ffn.routing_bias = layer.ffn.routing_bias.half()


@dataclass
class UnbuildableModelArgs(RightModelArgs):
    def __post_init__(self):
        raise ZeroDivisionError("division by zero")


@mutant("contract.builds", UnbuildableModelArgs)
class CannotBeBuilt(RightModel):
    Args = UnbuildableModelArgs


@mutant("contract.builds")
class CrashesInForward(Overridden):
    def before(self, input_ids, targets):
        return input_ids + self.no_such_attribute
