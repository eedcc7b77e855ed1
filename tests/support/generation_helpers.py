"""Small random models and prompts for the tests of generation, and its definitions in plain Python."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from model import BaseModel, BaseModelArgs, get_model_and_args, list_models
from tests.planted.unusual import Hybrid, LearnedPositions, Recurrent, RunningMean

V = 61
LONGEST = 48  # max_seq_len
TOKENIZER = SimpleNamespace(eos_id=2, im_end_id=5)
PROMPTS = [[1, 7, 8, 9], [1, 20], [1, 33, 34, 35, 36, 37, 38, 39, 40], [1, 50, 51, 52], [4] * 30]
TINY = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_activated_experts": 2,
}


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


class RunningSum(NoState):
    """The same with a recurrent state: a running sum. One token too many in it changes every later one."""

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


PLANTED = {Model.__name__: Model for Model in (Recurrent, Hybrid, RunningMean, LearnedPositions)}
MODELS = [*list_models(), "no state", "recurrent"]
UNUSUAL = [
    *list_models(),
    "Recurrent",
    "no state",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Hybrid", "RunningMean", "LearnedPositions")),
]


def build(name, longest=LONGEST):
    """A model of MODELS or UNUSUAL with large random weights, so that rounding does not decide the likeliest token."""
    torch.manual_seed(3)
    if name in ("no state", "recurrent"):
        return {"no state": NoState, "recurrent": RunningSum}[name](BaseModelArgs(V, longest)).eval()
    if name in PLANTED:
        Model = PLANTED[name]
        model = Model(Model.Args(vocab_size=V, max_seq_len=longest))
    else:
        Model, ModelArgs = get_model_and_args(name)
        known = {field.name for field in dataclasses.fields(ModelArgs)}
        model = Model(ModelArgs(vocab_size=V, max_seq_len=longest, **{k: v for k, v in TINY.items() if k in known}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model.eval()


def probabilities(logits, temperature, top_k, top_p, min_p):
    """The filters by their definitions, one token at a time, in Python's own float64."""
    scores = [value / temperature for value in logits]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[:top_k] if top_k else order
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in kept}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in order[: len(weights)]:
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@torch.no_grad()
def generate_alone(model, ids, sampling, max_new_tokens, stops=()):
    """An answer by its definition: run all tokens again for each one, penalize, filter, invert the distribution."""
    answer = []
    n_tokens = min(max_new_tokens, LONGEST - len(ids))
    uniforms = 1 - torch.rand(n_tokens, generator=torch.Generator().manual_seed(sampling.seed))
    for uniform in uniforms.tolist():
        scores = model(torch.tensor([ids + answer]))[0][0, -1].tolist()
        for token in {*ids, *answer}:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores = [score - sampling.frequency_penalty * answer.count(token) for token, score in enumerate(scores)]
        likeliest_first = sorted(range(V), key=lambda token: -scores[token])
        if sampling.temperature == 0:
            token = likeliest_first[0]
        else:
            probs = probabilities(scores, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            few = 0 < sampling.top_k < V or sampling.top_p < 1  # then the draw goes by decreasing probability
            cumulative, order = 0.0, likeliest_first if few else range(V)
            for token in order:
                cumulative += probs[token]
                if cumulative >= uniform:
                    break
        if token in stops:
            break
        answer.append(token)
    return answer
