"""The loss: shifted, summed, smoothed, divided by the wrong count; and the other entries of other_vars."""

import torch
import torch.nn.functional as F

from .right import MoEModel, RightModel, mutant

MEAN, TERMS = "loss.mean_over_valid_targets", "contract.loss_is_sum_of_terms"


@mutant(MEAN)
class ShiftsTargetsAgain(RightModel):
    def cross_entropy(self, logits, targets):
        return super().cross_entropy(logits[:, :-1], targets[:, 1:])


@mutant(MEAN)
class SumsTheLoss(RightModel):
    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@mutant(MEAN)
class DividesByAllPositions(RightModel):
    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").mean()


@mutant(MEAN)
class MeanOfTheSequenceMeans(RightModel):
    def cross_entropy(self, logits, targets):
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (loss.sum(dim=1) / (targets != -100).sum(dim=1).clamp(min=1)).mean()


@mutant(MEAN)
class IgnoredCountAsClassZero(RightModel):
    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0))


@mutant(MEAN)
class IgnoresThePaddingTokenInstead(RightModel):
    """ignore_index=0, and -100 wrapped around to a real class."""

    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten() % logits.shape[-1], ignore_index=0)


@mutant(MEAN)
class SmoothsTheLabels(RightModel):
    def cross_entropy(self, logits, targets):
        valid = (targets != -100).sum().clamp(min=1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1) / valid


@mutant("contract.train_equals_eval")
class SmoothsInEvalOnly(RightModel):
    def cross_entropy(self, logits, targets):
        valid, smoothing = (targets != -100).sum().clamp(min=1), 0.0 if self.training else 0.1
        flat = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(*flat, reduction="sum", label_smoothing=smoothing) / valid


@mutant("loss.nothing_to_predict")
class NothingValidIsNaN(RightModel):
    def cross_entropy(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@mutant("loss.nothing_to_predict")
class NothingValidHasNoGraph(RightModel):
    def cross_entropy(self, logits, targets):
        return super().cross_entropy(logits, targets) if (targets != -100).any() else torch.zeros(())


@mutant("loss.ignored_targets_have_no_gradient")
class GradientOfIgnoredTargets(RightModel):
    """The value is right; the gradient is that of another loss (a custom backward without the mask)."""

    def cross_entropy(self, logits, targets):
        right = super().cross_entropy(logits, targets)
        other = F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0))
        return other + (right - other).detach()


@mutant("contract.loss_exactly_with_targets")
class LossInTrainingOnly(RightModel):
    def losses(self, *args):
        loss, other_vars = super().losses(*args)
        return loss if self.training else None, other_vars


@mutant("contract.loss_exactly_with_targets")
class LossWithoutTargets(RightModel):
    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        logits, loss, other_vars = super().forward(input_ids, targets, state, doc_ids)
        return logits, torch.zeros(()) if loss is None else loss, other_vars


@mutant("contract.loss_exactly_with_targets")
class LossForEveryToken(RightModel):
    def losses(self, logits, targets, balances, other_vars):
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), other_vars


@mutant(TERMS)
class BalanceReportedNotAdded(MoEModel):
    def losses(self, logits, targets, balances, other_vars):
        loss, other_vars = super().losses(logits, targets, balances, other_vars)
        return loss - other_vars["loss/balance"], other_vars


@mutant(TERMS)
class BalanceAddedDetached(MoEModel):
    """The value is right, but has no gradient."""

    def losses(self, logits, targets, balances, other_vars):
        loss, other_vars = super().losses(logits, targets, balances, other_vars)
        return loss - other_vars["loss/balance"] + other_vars["loss/balance"].detach(), other_vars


@mutant(TERMS)
class StatisticKeepsItsGraph(RightModel):
    def losses(self, logits, targets, balances, other_vars):
        return super().losses(logits, targets, balances, {"logits/size": logits.square().mean()})


@mutant(TERMS)
class StatisticIsAFloat(RightModel):
    def losses(self, logits, targets, balances, other_vars):
        loss, other_vars = super().losses(logits, targets, balances, other_vars)
        return loss, {**other_vars, "logits/size": logits.abs().mean().item()}


@mutant("contract.logits_are_those_of_the_loss")
class CapsLogitsOfTheLossOnly(RightModel):
    def forward(self, input_ids, targets=None, state=None, doc_ids=None):
        logits, loss, other_vars = super().forward(input_ids, targets, state, doc_ids)
        return logits if targets is None else 2 * (logits / 2).tanh(), loss, other_vars


@mutant("causality.losses_see_the_past_only")
class SecondHeadReadsTheNextPosition(RightModel):
    def losses(self, logits, targets, balances, other_vars):
        second = self.cross_entropy(logits + logits.roll(-1, dims=1), targets)
        return super().losses(logits, targets, balances, {**other_vars, "loss/second": 0.3 * second})


@mutant("precision.large_weights_stay_finite")
class TakesTheLogarithmOfASoftmax(RightModel):
    def cross_entropy(self, logits, targets):
        valid = targets != -100
        chosen = logits.float().softmax(dim=-1)[valid].gather(1, targets[valid][:, None])
        return -chosen.log().sum() / valid.sum().clamp(min=1)
