"""Every codec of the registry, in several configurations, against the conformance list."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tersekv.spec import codecs, parse_codec, print_codec
from tersekv.testing import check_codec

GOLDEN = Path(__file__).parent / "golden.json"
# Every registered codec as it is by default, and more of ours. A new codec needs no line here.
CONFIGURATIONS = [
    *sorted(codecs()),
    "none:dtype=fp16",
    "none:dtype=fp32",
    *(f"intn:bits={bits}" for bits in (2, 3, 5, 6, 7, 8)),
    "intn:bits=4,group=16",
    "intn:bits=3,axis=channel",
    "intn:bits=2,axis=channel,group=32",
    "intn:bits=4,symmetric=yes",
    "intn:bits=8,axis=channel,group=16,symmetric=yes",
    "direction:bits=2,norm=log8",
    "direction:bits=3,codebook=shared",
    "kivi:bits=4,group=64",
    "kvquant:bits=2,outliers=0",
    "kvquant:bits=4,outliers=2",
    *(f"lloydmax:bits={bits}" for bits in (1, 2, 4, 5, 6, 7, 8)),
    "lloydmax:bits=3,norm=fp32",
    "outliers:bits=2,more=2",
    "outliers:bits=3,by=peak",
    "polar:bits=3",
    "qjl:bits=1",
    *(f"rotated:bits={bits}" for bits in (1, 2, 4, 5, 6, 7, 8)),
    "rotated:bits=3,mean=none",
    "rotated:bits=2,scale=norm,scale_kind=fp16",
    "rotated:bits=4,scale_kind=int8",
    "rotated:bits=4,seed=7",
    *(f"trellis:bits={bits}" for bits in (1, 2, 4)),
    "turboquant:bits=2,form=prod",
    "turboquant:bits=4,form=prod,seed=3",
    "twoaxis:bits=2,axis=token,rounds=1",
    "twoaxis:bits=3,axis=token",
    "vq:dim=16,index=6",
    "vq:dim=8,index=6,scale=unbiased",
    "vq:dim=4,mean=none",
    "vq:dim=16,stages=2",
]


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_conformance(text: str, side: str) -> None:
    check_codec(parse_codec(text, side), side)


@pytest.mark.parametrize("name", ["intn", "lloydmax", "rotated"])
def test_more_bits_are_nearer(name: str) -> None:
    x = torch.randn(4, 64, 128)
    errors = []
    for bits in (2, 3, 4, 5, 6, 8):
        codec = parse_codec(f"{name}:bits={bits}", "v")
        errors.append((codec.decode(codec.encode(x)) - x).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def golden_input(d: int) -> torch.Tensor:
    """The same numbers everywhere: a hash of the index, no random generator."""
    i = torch.arange(2 * 64 * d, dtype=torch.int64)
    x = ((i * 2654435761 + 12345) % 2**32).double() / 2**31 - 1
    return (x**3 * 4).float().view(2, 64, d)


@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_golden_bytes(text: str, d: int) -> None:
    """Stored caches stay readable: the bytes of a fixed input never change within a format version."""
    codec = parse_codec(text, "k")
    digest = hashlib.sha256(codec.encode(golden_input(d)).data.numpy().tobytes()).hexdigest()[:16]
    recorded = json.loads(GOLDEN.read_text())
    key = f"{print_codec(codec, 'k')} d={d}"
    assert key in recorded, "new codec: run `python tests/make_golden.py`"
    assert recorded[key] == digest
