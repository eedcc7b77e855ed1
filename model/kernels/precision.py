"""The dtype that matmuls are computed in."""

import torch


def compute_dtype(x):
    """Return the dtype of matmuls with `x`: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
