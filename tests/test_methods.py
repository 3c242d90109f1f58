"""What each published method promises, on data where the promise can fail."""

import pytest
import torch
from torch import Tensor

from tersekv.layout import BLOCK
from tersekv.spec import parse_codec


def biased_keys(d: int = 128, blocks: int = 4) -> Tensor:
    """Blocks (blocks, 64, d) with a strong constant on a few channels, as Qwen2's key biases make them."""
    bias = torch.zeros(d)
    bias[[5, 17, 40]] = torch.tensor([30.0, -18.0, 9.0])
    return torch.randn(blocks, BLOCK, d) + bias


def error(text: str, x: Tensor, side: str = "k") -> float:
    """Squared error over the energy of what varies between tokens: a constant of all keys moves no attention."""
    codec = parse_codec(text, side)
    left = codec.decode(codec.encode(x)) - x
    return float(left.square().sum() / (x - x.mean(-2, keepdim=True)).square().sum())


def test_kivi_keys_are_better_per_channel_and_values_may_have_either() -> None:
    x = biased_keys()
    for bits in (2, 3, 4):
        channel, token = (error(f"kivi:bits={bits},axis={axis}", x) for axis in ("channel", "token"))
        assert channel < 0.25 * token
    plain = torch.randn(4, BLOCK, 128)
    assert error("kivi", plain, "v") < 1.2 * error("kivi:axis=channel", plain, "v")


@pytest.mark.parametrize("codebook", ["channel", "shared"])
def test_direction_keeps_the_length(codebook: str) -> None:
    """Renormalised: at 2 bits the decoded length is the token's, up to the rounding of an fp16 number."""
    codec, x = parse_codec(f"direction:bits=2,norm=fp16,codebook={codebook}", "k"), biased_keys()
    lengths = codec.decode(codec.encode(x)).norm(dim=-1) / x.norm(dim=-1)
    assert (lengths - 1).abs().max() < 2**-11 + 1e-6
    assert error(f"direction:bits=2,norm=fp16,codebook={codebook}", x) > 0.01


def test_direction_follows_each_channel() -> None:
    x = biased_keys()
    assert error("direction:bits=3", x) < 0.1 * error("direction:bits=3,codebook=shared", x)
