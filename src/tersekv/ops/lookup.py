"""Nearest entry of a codebook: the encoding half of the `grid` recipe for tables that are odd-symmetric."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def nearest(z: Float[Tensor, "*shape"], thresholds: Float[np.ndarray, "t"]) -> UInt8[Tensor, "*shape"]:
    """Codes of an odd-symmetric table given the thresholds between its positive entries.

    The magnitude's level is the number of thresholds strictly below it; negative values mirror it. A value on a
    threshold therefore goes to the smaller magnitude, and encoding -x mirrors encoding x.
    """
    half = len(thresholds) + 1
    level = torch.bucketize(z.abs(), torch.from_numpy(thresholds).to(z.device), out_int32=True)
    return torch.where(z < 0, half - 1 - level, half + level).to(torch.uint8)
