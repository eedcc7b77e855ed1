"""A compiled step of decoding: the whole forward of one token a row as one program, its weights packed for it."""
import torch


@torch.inference_mode()
def compile_decoding(model, rows=1):
    """From now on, whoever reads one token a row through a state (engine/rows.py) runs a compiled forward.

    Nothing for a model without a state, which reads its whole text for every token. The programs are made here, by
    writing a few tokens: one for a single row at any position, and for up to `rows` side by side one for any number.
    The weights must not change any more: the program has its own copy of them, packed for the processor's products.
    """
    if not model.accepts("state"):
        return

    def step(ids, state):
        return model(ids, state=state)[0]

    # freezing: on the CPU bf16 products of prepacked weights read twice as fast as those of plain ones
    options = {"freezing": True} if next(model.parameters()).device.type == "cpu" else {}
    model.decoding_step = torch.compile(step, options=options)
    for count in sorted({1, min(2, rows), rows}):
        for longest in (4, 5):
            _write(model, count, min(model.args.max_seq_len, longest))


def _write(model, rows, tokens):
    """Let the compiler see several positions, in states of several lengths: what varies it takes as a variable."""
    state = model.init_state(rows, tokens)
    state.last_only = True
    token = torch.zeros(rows, 1, dtype=torch.long, device=state.pos.device)
    model(token, state=state)
    state.advance(1)
    while state.upto < tokens:
        model.decoding_step(token, state)
        state.advance(1)
