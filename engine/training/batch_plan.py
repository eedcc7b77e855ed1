"""How the sequences of an optimizer step divide into micro-batches and processes, and how many steps a run takes."""

from dataclasses import dataclass, replace

from engine.distributed import process_group
from engine.training.config import TrainConfig
from utils.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The division of a step: global_sequences = micro_sequences x accumulation x processes.

    Over the first `ramp_steps` steps the batch is smaller: a quarter of global_sequences, and after half of them, half.
    """

    global_sequences: int
    micro_sequences: int
    accumulation: int
    ramp_steps: int = 0

    def sequences_at(self, step: int) -> int:
        """Sequences of step `step` (0-based) over all processes."""
        return self.global_sequences // (1 if step >= self.ramp_steps else 2 if 2 * step >= self.ramp_steps else 4)

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before `step`: the position in the data at which it begins. Nothing is stored."""
        half = -(-self.ramp_steps // 2)
        smaller = min(step, self.ramp_steps)
        return (
            (step - smaller) * self.global_sequences
            + max(0, smaller - half) * (self.global_sequences // 2)
            + min(smaller, half) * (self.global_sequences // 4)
        )

    def micro_sequences_at(self, step: int) -> int:
        """Sequences per micro-batch of step `step`."""
        processes = self.global_sequences // (self.micro_sequences * self.accumulation)
        return _largest_divisor(self.sequences_at(step) // processes, self.micro_sequences)


def plan_batch(config: TrainConfig, seq_len: int) -> BatchPlan:
    """The plan of a step without its ramp; UserError when the processes cannot share the global batch evenly.

    The global batch decides the loss curve; processes and micro-batches only decide how it is computed.
    """
    processes = process_group.world_size()
    sequences = config.global_batch_size
    if config.global_batch_tokens:
        sequences = max(1, config.global_batch_tokens // seq_len)
        sequences -= sequences % 2 ** max(0, sequences.bit_length() - 4)  # keep four leading bits: 976 -> 960 = 15 x 64
    sequences = sequences or config.max_batch_size * config.accumulation_steps * processes
    divisor = processes * (4 if config.batch_ramp_ratio else 1)  # a quarter of the batch is shared evenly, too
    if sequences % divisor:
        raise UserError(
            f"a step of {sequences} sequences cannot be divided evenly among {processes} processes"
            f"{', in quarters for --batch_ramp_ratio' if config.batch_ramp_ratio else ''}: "
            f"choose a --global_batch_size that is a multiple of {divisor}"
        )
    per_process = sequences // processes
    micro = _largest_divisor(per_process, config.max_batch_size or per_process)
    return BatchPlan(sequences, micro, per_process // micro)


def plan_run(config: TrainConfig, sequences: int, seq_len: int) -> tuple[BatchPlan, int]:
    """Return (the plan with its ramp, the number of optimizer steps).

    Steps are given by max_steps, else max_tokens, else epochs, and are at least one. sequences: in the training data.
    """
    plan = plan_batch(config, seq_len)
    wanted = config.max_tokens // seq_len if config.max_tokens else int(config.epochs * sequences)
    # half of the ramp's steps have a quarter of the batch and half of them a half: 3/8 on average
    steps = config.max_steps or max(1, int(wanted / (plan.global_sequences * (1 - 0.625 * config.batch_ramp_ratio))))
    return ramped(plan, config, steps), steps


def ramped(plan: BatchPlan, config: TrainConfig, steps: int) -> BatchPlan:
    """The plan of a step with the ramp of a run of `steps` steps."""
    return replace(plan, ramp_steps=round(config.batch_ramp_ratio * steps))


def _largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`."""
    return next(part for part in range(min(number, at_most), 0, -1) if number % part == 0)
