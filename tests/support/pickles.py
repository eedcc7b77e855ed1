"""Files with a pickle that runs code when it is loaded."""

import os
import pickle

import torch


class Payload:
    """Unpickled, it makes the folder `executed` in the current one."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def raw_pickle(path):
    path.write_bytes(pickle.dumps(Payload()))


def torch_file(path):
    torch.save({"step": 1, "optimizers": Payload()}, path)
