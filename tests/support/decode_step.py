"""A model together with its decode step, for code that calls a model."""


class WithDecodeStep:
    """Calls `decode_step` where the model would be called with a state; all else is the model's."""

    def __init__(self, model, decode_step):
        self.model = model
        self.decode_step = decode_step

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, state):
        return self.decode_step(ids, state), None, {}
