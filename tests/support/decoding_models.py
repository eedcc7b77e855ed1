"""Small models with random weights, for tests of decoding: registered ones, unusual ones and two without attention."""

from types import SimpleNamespace

import pytest
import torch

from model import BaseModel, BaseModelArgs, get_model_and_args
from tests.mutants.unusual import Hybrid, LearnedPositions, Recurrent, RunningMean, WindowsAndTails
from tests.support.models import SHIPPED, TINY, sizes_of

V, LONGEST = 61, 48
TOKENIZER = SimpleNamespace(eos_id=2, im_end_id=5, stop_ids=(2, 5))
PROMPTS = [[1, 7, 8, 9], [1, 20], [1, 33, 34, 35, 36, 37, 38, 39, 40], [1, 50, 51, 52], [4] * 30]
UNUSUAL_MODELS = {
    Model.__name__: Model for Model in (Recurrent, Hybrid, RunningMean, LearnedPositions, WindowsAndTails)
}
EVERY = [
    *SHIPPED,
    "Recurrent",
    "WindowsAndTails",
    "no state",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Hybrid", "RunningMean", "LearnedPositions")),
]


class NoState(BaseModel):
    """A plugin with the required forward and nothing else: a causal mean of embeddings, and positions."""

    def __init__(self, args):
        super().__init__(args)
        self.tok_embed = torch.nn.Embedding(args.vocab_size, 16)
        self.position = torch.nn.Embedding(args.max_seq_len, 16)
        self.lm_head = torch.nn.Linear(16, args.vocab_size)

    def forward(self, input_ids, targets=None):
        x = self.tok_embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.lm_head(torch.tanh(x + 3 * x.cumsum(1) / count)), None, {}


class Remembers(NoState):
    """The same with a recurrent state: a running sum. One token too many in it would show in every later one."""

    def init_state(self, batch_size, max_len=None):
        state = super().init_state(batch_size, max_len)
        state.layers = [{"sum": torch.zeros(batch_size, 1, 16)}]
        return state

    def forward(self, input_ids, targets=None, state=None):
        if state is None:
            return super().forward(input_ids, targets)
        at = state.positions(input_ids.shape[1])  # (B, T)
        x = self.tok_embed(input_ids) + self.position.weight[at]
        sums = x.cumsum(1) + state.layers[0]["sum"]
        state.layers[0]["sum"] = sums[:, -1:]
        return self.lm_head(torch.tanh(x + 3 * sums / (at + 1)[..., None])), None, {}


def build(name, longest=LONGEST):
    """A model of EVERY, or "recurrent", with large random weights: rounding does not decide the likeliest token."""
    torch.manual_seed(3)
    if name in ("no state", "recurrent"):
        return {"no state": NoState, "recurrent": Remembers}[name](BaseModelArgs(V, longest)).eval()
    if name in UNUSUAL_MODELS:
        Model = UNUSUAL_MODELS[name]
        model = Model(Model.Args(vocab_size=V, max_seq_len=longest))
    else:
        Model, ModelArgs = get_model_and_args(name)
        model = Model(ModelArgs(vocab_size=V, max_seq_len=longest, **sizes_of(name, TINY)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model.eval()


def bf16(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model
