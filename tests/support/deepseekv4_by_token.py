"""DeepSeek-V4 token by token, one document alone: the equations as loops, in the dtype of the weights.

It shares no code with the model: it reads its parameters by name.
"""

import math

import torch
from torch import Tensor

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


class ByToken:
    """`logits` (T, V) of the document `ids`; `kl` {layer of CSA: one value per token}."""

    def __init__(self, args, weights: dict[str, Tensor], ids: list[int]) -> None:
        self.args = args
        self.weights = weights
        self.ids = ids
        self.kl: dict[int, list[Tensor]] = {}
        streams = [weights["tok_embed.weight"][i].repeat(args.hc_mult, 1) for i in ids]  # T of (n, D)
        for layer in range(args.n_layers):
            name = f"layers.{layer}."
            streams = self.around(
                name + "attn_hc.", name + "attn_norm", streams, lambda xs, n=layer: self.attend(n, xs)
            )
            streams = self.around(name + "ffn_hc.", name + "ffn_norm", streams, lambda xs, n=layer: self.moe(n, xs))
        last = [self.norm("norm", self.read("hc_head.", x)) for x in streams]
        head = weights.get("lm_head.weight", weights["tok_embed.weight"])
        self.logits = torch.stack([head @ x for x in last])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.unit(x) * self.weights[f"{name}.weight"]

    def unit(self, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.args.norm_eps).sqrt()

    # ---------------------------------------------------------------- streams

    def coefficients(self, name: str, x: Tensor) -> Tensor:
        w = self.weights
        return w[name + "scale"] * (w[name + "proj"] @ self.unit(x.flatten())) + w[name + "bias"]

    def read(self, name: str, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.coefficients(name, x)) + self.args.hc_eps
        return sum(share[i] * x[i] for i in range(self.args.hc_mult))

    def around(self, hc: str, norm: str, streams: list, sublayer) -> list:
        outputs = sublayer([self.norm(norm, self.read(hc + "pre.", x)) for x in streams])
        return [self.write(hc, x, out) for x, out in zip(streams, outputs, strict=True)]

    def write(self, hc: str, x: Tensor, out: Tensor) -> Tensor:
        n, eps = self.args.hc_mult, self.args.hc_eps
        share = 2 * torch.sigmoid(self.coefficients(hc + "post.", x))
        raw = self.coefficients(hc + "res.", x)
        m = [
            [raw[i * n + j].exp() / sum(raw[i * n + k].exp() for k in range(n)) + eps for j in range(n)]
            for i in range(n)
        ]
        for step in range(2 * self.args.hc_iters - 1):
            if step % 2:
                sums = [sum(row) + eps for row in m]
                m = [[m[i][j] / sums[i] for j in range(n)] for i in range(n)]
            else:
                sums = [sum(row[j] for row in m) + eps for j in range(n)]
                m = [[m[i][j] / sums[j] for j in range(n)] for i in range(n)]
        return torch.stack([share[k] * out + sum(m[j][k] * x[j] for j in range(n)) for k in range(n)])

    # ---------------------------------------------------------------- experts

    def moe(self, layer: int, xs: list) -> list:
        name, w, a = f"layers.{layer}.ffn.", self.weights, self.args
        outputs = []
        for token, x in zip(self.ids, xs, strict=True):
            affinity = torch.log1p((w[name + "router"] @ x).exp()).sqrt()
            if layer < a.n_hash_layers:
                chosen = w[name + "table"][token].tolist()
            else:
                score = affinity + w[name + "routing_bias"]
                chosen = sorted(range(a.n_routed_experts), key=lambda e, s=score: -s[e].item())[: a.n_activated_experts]
            total = sum(affinity[e] for e in chosen)
            stacks = [w[name + part] for part in ("gate_proj", "up_proj", "down_proj")]
            shared = [w[f"{name}shared.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj")]
            routed = sum(
                a.route_scale * affinity[e] / total * self.expert(x, *(stack[e] for stack in stacks)) for e in chosen
            )
            outputs.append(routed + self.expert(x, *shared))
        return outputs

    def expert(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        limit = self.args.swiglu_limit
        g = torch.minimum(gate @ x, torch.full_like(gate[:, 0], limit))
        u = (up @ x).clamp(-limit, limit)
        return down @ (g * torch.sigmoid(g) * u)

    # ---------------------------------------------------------------- attention

    def rotated(self, x: Tensor, position: int, theta: float) -> Tensor:
        n = self.args.qk_rope_head_dim
        out = list(x)
        for j in range(n // 2):
            angle = position * theta ** (-2 * j / n)
            a, b = x[j], x[j + n // 2]
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + n // 2] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(out)

    def entries(self, name: str, xs: list, ratio: int, overlap: bool, theta: float) -> list:
        """One entry for each complete window."""
        w = self.weights
        kv, gate = ([w[f"{name}.{part}.weight"] @ x for x in xs] for part in ("kv_proj", "gate_proj"))
        bias, dim = w[f"{name}.position_bias"], w[f"{name}.norm.weight"].shape[0]
        out = []
        for window in range(len(xs) // ratio):
            values, scores = [], []
            if overlap and window:
                for i in range(ratio):
                    values.append(kv[(window - 1) * ratio + i][:dim])
                    scores.append(gate[(window - 1) * ratio + i][:dim] + bias[i])
            for i in range(ratio):
                values.append(kv[window * ratio + i][-dim:])
                scores.append(gate[window * ratio + i][-dim:] + bias[i - ratio])
            total = sum(score.exp() for score in scores)
            mean = sum(score.exp() / total * value for score, value in zip(scores, values))
            out.append(self.rotated(self.norm(f"{name}.norm", mean), window * ratio, theta))
        return out

    def attend(self, layer: int, xs: list) -> list:
        name, w, a = f"layers.{layer}.attn.", self.weights, self.args
        kind = a.kinds()[layer]
        theta = a.compress_rope_theta if kind in (CSA, HCA) else a.rope_theta
        ratio = {CSA: a.csa_ratio, HCA: a.hca_ratio}.get(kind, 0)
        latents = [self.norm(name + "q_a_norm", w[name + "q_a_proj.weight"] @ x) for x in xs]
        keys = [
            self.rotated(self.norm(name + "kv_norm", w[name + "kv_proj.weight"] @ x), t, theta)
            for t, x in enumerate(xs)
        ]
        entries = self.entries(name + "compressor", xs, ratio, kind == CSA, theta) if ratio else []
        index = None
        if kind == CSA:
            inputs = [x.detach() for x in xs]
            index = self.entries(name + "indexer.compressor", inputs, ratio, True, theta)
        outputs = []
        for t in range(len(xs)):
            seen = (t + 1) // ratio if ratio else 0
            chosen, scores = list(range(seen)), None
            if index is not None:
                scores = [self.index_score(name, xs[t], latents[t], key, t, theta) for key in index[:seen]]
                chosen = sorted(range(seen), key=lambda s, found=scores: (-found[s].item(), s))[: a.index_topk]
            visible = keys[max(0, t - a.window_size + 1) : t + 1] + [entries[s] for s in chosen]
            out, on_entries = self.softmax_of(name, latents[t], visible, len(chosen), t, theta)
            if index is not None:
                self.kl.setdefault(layer, []).append(self.divergence(scores, chosen, on_entries))
            outputs.append(w[name + "o_proj.weight"] @ out)
        return outputs

    def softmax_of(self, name, latent, visible, n_entries, t, theta) -> tuple[Tensor, Tensor]:
        """The output before o_proj, and the probabilities of the entries summed over the heads."""
        w, a = self.weights, self.args
        q = (w[name + "q_b_proj.weight"] @ latent).unflatten(0, (a.n_heads, -1))
        heads, on_entries = [], torch.zeros(n_entries, dtype=latent.dtype)
        for h in range(a.n_heads):
            one = self.rotated(self.unit(q[h]), t, theta)
            raw = torch.stack([one @ key / math.sqrt(a.head_dim) for key in visible] + [w[name + "sinks"][h]]).exp()
            probs = raw / raw.sum()
            mixed = sum(p * key for p, key in zip(probs, visible))  # the sink has no value
            heads.append(self.rotated(mixed, -t, theta))
            on_entries = on_entries + probs[len(visible) - n_entries : len(visible)].detach()
        per_group = a.n_heads // a.o_groups
        groups = [torch.cat(heads[g * per_group : (g + 1) * per_group]) for g in range(a.o_groups)]
        return torch.cat([w[name + "o_a_proj"][g] @ group for g, group in enumerate(groups)]), on_entries

    def index_score(self, name, x, latent, key, t, theta) -> Tensor:
        w, a = self.weights, self.args
        q = (w[name + "indexer.q_proj.weight"] @ latent.detach()).unflatten(0, (a.index_n_heads, -1))
        weight = w[name + "indexer.weight_proj.weight"] @ x.detach()
        scores = [weight[h] * (self.rotated(q[h], t, theta) @ key).clamp(min=0) for h in range(a.index_n_heads)]
        return sum(scores) / math.sqrt(a.index_n_heads * a.index_head_dim)

    def divergence(self, scores, chosen, on_entries) -> Tensor:
        if not chosen:
            return self.weights["norm.weight"].sum() * 0
        target = on_entries / on_entries.sum()
        log_q = torch.stack([scores[s] for s in chosen])
        log_q = log_q - log_q.exp().sum().log()
        return sum(p * (p.log() - q) for p, q in zip(target, log_q))
