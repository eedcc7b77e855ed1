"""A compiled step of decoding: the whole forward of one token a row as one program, its weights packed for it."""
import torch


@torch.inference_mode()
def compile_decoding(model):
    """From now on, whoever reads one token a row through a state (engine/rows.py) runs a compiled forward.

    Nothing for a model without a state, which reads its whole text for every token. The program is made here, by
    writing a few tokens, and takes any position; it is made again for more than one row, once for all their numbers.
    The weights must not change any more: the program has its own copy of them, packed for the processor's products.
    """
    if not model.accepts("state"):
        return

    def step(ids, state):
        return model(ids, state=state)[0]

    # freezing: on the CPU bf16 products of prepacked weights read twice as fast as those of plain ones
    options = {"freezing": True} if next(model.parameters()).device.type == "cpu" else {}
    model.decoding_step = torch.compile(step, options=options)
    longest = min(model.args.max_seq_len, 8)
    state = model.init_state(1, longest)
    state.last_only = True
    token = torch.zeros(1, 1, dtype=torch.long, device=state.pos.device)
    model(token, state=state)
    state.advance(1)
    while state.upto < longest:          # the second position shows the compiler that positions vary
        model.decoding_step(token, state)
        state.advance(1)
