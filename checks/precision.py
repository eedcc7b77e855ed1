"""Does it survive what training does to it for speed: bf16, and the compiler?"""

import torch

from .subject import LONG, NotApplicable, Subject, call, logits_of, next_tokens, require, require_close


@torch.no_grad()
def bf16_stays_near_fp32(subject: Subject):
    """Under bf16 autocast the logits and the loss stay near those of fp32, at the beginning and the end of a long row.

    Measured: over 300 tokens, the relative error of each token's logits; its median may be 5%, and in no quarter of the
    row more than three times that of the first. The loss may differ by 2%.
    Causes: positions or their angles in the type of the activations (bf16 has no odd number above 256); a cumulative
    sum, a decay or a softmax over many tokens in bf16; logits or the loss in bf16; a constant such as -1e9 in a type
    that cannot hold it.
    """
    try:
        model, length = subject.build_long(), LONG
    except NotApplicable:
        model, length = subject.build(), subject.args.max_seq_len
    ids = subject.tokens(rows=2, length=length)
    want = logits_of(model, ids)
    want_loss = subject.task_loss(*call(model, ids, targets=next_tokens(ids))[1:]).item()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model, ids).float()
        loss = subject.task_loss(*call(model, ids, targets=next_tokens(ids))[1:])
    require(got.isfinite().all(), "logits under bf16 autocast are not all finite")
    centred = want - want.mean(dim=-1, keepdim=True)
    error = ((got - want).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-6)).mean(dim=0)  # (T,)
    quarters = [q.median().item() for q in error.tensor_split(4)]
    seen = "the median relative error of the logits is " + ", ".join(f"{q:.2%}" for q in quarters) + " by quarter of the row"
    require(max(quarters) < 0.05, seen)
    require(max(quarters) < 3 * quarters[0] + 0.005, f"{seen}: it grows with the position")
    require(loss.isfinite(), f"the loss under bf16 autocast is {loss.item()}")
    require(abs(loss.item() - want_loss) < 0.02 * abs(want_loss) + 0.02,
            f"the loss under bf16 autocast is {loss.item():.5g}, in fp32 {want_loss:.5g}")


def bf16_gradients_are_finite(subject: Subject):
    """Backward under bf16 autocast gives finite gradients that point where those of fp32 point.

    Measured: the cosine between the two gradients of the loss, over all parameters: above 0.9.
    Causes: a custom backward that mixes types; an exponential or a division that overflows; a scale that underflows.
    """
    ids, grads = subject.tokens(), []
    for bf16 in (False, True):
        model = subject.build().train()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = call(model, ids, targets=next_tokens(ids))[1]
        loss.backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        require(not bad, f"under bf16 autocast the gradient of {', '.join(bad[:4])} is not finite")
        grads.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
                                for p in model.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    require(cosine > 0.9, f"the cosine between the gradients of bf16 and fp32 is {cosine:.3f}")


def compiled_equals_eager(subject: Subject):
    """torch.compile gives the same loss and gradients, and compiles nothing anew from the third step on.

    Measured: six training steps on different data with the backend "aot_eager" (what the compiler traces and
    differentiates, without generating code), hooks called; the graphs compiled in each step are counted.
    Causes: a Python number on the module, or taken from a tensor (`.item()`, `.tolist()`), that changes every step; a
    branch on the values of a tensor; a list that grows; an in-place edit that the tracer cannot see.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    eager, model = subject.build().train(), subject.build().train()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    counts = []
    # Beyond its limit the compiler gives up without a word and runs the rest as it is: here it must go on counting.
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        for step in range(6):
            ids = subject.tokens(seed=30 + step)
            model.before_step(step, 6)
            torch.manual_seed(step)
            _, loss, other_vars = compiled(ids, targets=next_tokens(ids))
            if step == 0:
                _same_as_eager(eager, ids, loss, model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.after_step({k: v.detach() for k, v in other_vars.items()})
            counts.append(len(graphs))
    torch._dynamo.reset()
    require(counts[-1] == counts[1], f"graphs compiled after each of six steps: {', '.join(map(str, counts))}; it "
            "should stay the same from the second on")


def _same_as_eager(eager, ids, loss, model):
    """Compare the first step, before any weight has moved; models with dropout cannot be compared number by number."""
    eager.before_step(0, 6)
    torch.manual_seed(0)
    want = call(eager, ids, targets=next_tokens(ids))[1]
    if not torch.equal(want, call(eager, ids, targets=next_tokens(ids))[1]):
        return
    require_close(loss.detach(), want.detach(), "loss compiled against eager", 1e-4)
    names = [n for n, p in eager.named_parameters() if p.requires_grad]
    one = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], retain_graph=True, allow_unused=True)
    two = torch.autograd.grad(want, [eager.get_parameter(n) for n in names], allow_unused=True)
    for name, got, expected in zip(names, one, two):
        if expected is not None:
            require(got is not None, f"compiled, {name} has no gradient")
            require_close(got, expected, f"gradient of {name}, compiled against eager", 1e-3)
