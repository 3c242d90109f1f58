"""The conformance list that every codec passes. Third parties run it on theirs: `check_codec(MyCodec())`.

Each check raises AssertionError with the codec, head dim and fact in its message.
"""

import torch
from torch import Tensor

from tersekv.codec import Codec
from tersekv.errors import SpecError
from tersekv.layout import BLOCK
from tersekv.ops.planes import read
from tersekv.packed import Packed, repack
from tersekv.spec import parse_codec, print_codec

HEAD_DIMS = (64, 80, 96, 128, 256)


def check_codec(codec: Codec, side: str = "k", head_dims: tuple[int, ...] = HEAD_DIMS) -> None:
    """Run every check at every head dim that the codec takes; at least one must be taken.

    A fitted one, for a model of two KV heads, is spared two: its tables need no entry for zero, and it folds queries of
    all heads at once.
    """
    assert parse_codec(print_codec(codec, side), side) == codec, f"{codec}: its text does not parse back to it"
    taken = [d for d in head_dims if _takes(codec, d)]
    assert taken, f"{codec}: takes none of the head dims {head_dims}"
    for d in taken:
        for check in (bytes_as_declared, blocks_alone, any_input, storage_orders, scales):
            check(codec, d)
        for check in (hard_blocks, folding) if codec.fitted is None else ():
            check(codec, d)


def _takes(codec: Codec, d: int) -> bool:
    try:
        codec.layout(d)
    except SpecError:
        return False
    return True


def sample(d: int, blocks: int = 3, seed: int = 0) -> Tensor:
    """Blocks (blocks, h=2, 1, block, d) like keys: Gaussian with channel means and one strong channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, 2, 1, BLOCK, d, generator=generator) + torch.randn(1, 2, 1, 1, d, generator=generator)
    x[..., 3] *= 10
    return x


def bytes_as_declared(codec: Codec, d: int) -> None:
    """Held bytes are the layout's; every plane lies inside, aligned, and overlaps no other; padding is zero."""
    x, layout = sample(d), codec.layout(d)
    packed = codec.encode(x)
    assert packed.layout == layout, f"{codec} d={d}: encode uses another layout than it declares"
    assert packed.data.dtype == torch.uint8 and packed.data.shape == (*x.shape[:-2], layout.nbytes), f"{codec} d={d}"
    used = torch.zeros(layout.nbytes, dtype=torch.int)
    for plane in layout.planes:
        used[layout.span(plane.name)] += 1
        assert layout.offsets[plane.name] % 16 == 0, f"{codec} d={d}: plane {plane.name} is not aligned"
    assert used.max() == 1, f"{codec} d={d}: planes overlap"
    assert not packed.data[..., used == 0].any(), f"{codec} d={d}: padding is not zero"


def blocks_alone(codec: Codec, d: int) -> None:
    """A block's bytes depend on nothing but the block: not on its neighbours, their number or their order."""
    x = sample(d)
    whole = codec.encode(x).data
    for i in range(len(x)):
        assert torch.equal(codec.encode(x[i : i + 1]).data[0], whole[i]), f"{codec} d={d}: block {i} depends on others"
    order = torch.tensor([2, 0, 1])
    assert torch.equal(codec.encode(x[order]).data, whole[order]), f"{codec} d={d}: the batch order matters"
    none = codec.encode(x[:0])
    assert none.data.shape == (0, *whole.shape[1:]), f"{codec} d={d}: no blocks"
    assert codec.decode(none).shape == (0, *x.shape[1:]), f"{codec} d={d}: no blocks, decoded"


def any_input(codec: Codec, d: int) -> None:
    """Strided and 16-bit input gives the bytes of its contiguous fp32 copy."""
    x = sample(d)
    strided = torch.empty(*x.shape[:-1], 2 * d)[..., ::2].copy_(x)
    assert torch.equal(codec.encode(strided).data, codec.encode(x).data), f"{codec} d={d}: strided input"
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert torch.equal(codec.encode(low).data, codec.encode(low.float()).data), f"{codec} d={d}: {dtype}"


def hard_blocks(codec: Codec, d: int) -> None:
    """Zero blocks stay exactly zero; constant, outlier and tiny ones stay finite and near."""
    x = sample(d)[0]
    assert not codec.decode(codec.encode(torch.zeros_like(x))).any(), f"{codec} d={d}: zero is not kept"
    outlier, constant, mixed = x.clone(), torch.full_like(x, 3.0), x.clone()
    outlier[..., 5] *= 1000
    mixed[..., BLOCK // 2 :, :] = 0
    for name, x in (("outlier", outlier), ("constant", constant), ("tiny", 1e-6 * sample(d)[0]), ("mixed", mixed)):
        y = codec.decode(codec.encode(x))
        assert torch.isfinite(y).all(), f"{codec} d={d}: a block with {name} values decodes to NaN or Inf"
        assert y.norm() <= 2 * x.norm() + 1e-3, f"{codec} d={d}: a block with {name} values grows"


def folding(codec: Codec, d: int) -> None:
    """Attention in the folded domain is attention on decoded values, and decoding is unfolding: up to fp32 rounding."""
    x = sample(d)
    packed = codec.encode(x)
    decoded, folded = codec.decode(packed), codec.recipe(d).values(packed)
    q = torch.randn(*x.shape[:-2], 5, d, generator=torch.Generator().manual_seed(1))
    scores, direct = codec.fold_query(q) @ folded.mT, q @ decoded.mT
    bound = 64 * torch.finfo(torch.float32).eps * q.norm(dim=-1)[..., None] * decoded.norm(dim=-1)[..., None, :]
    assert ((scores - direct).abs() <= bound + 1e-20).all(), f"{codec} d={d}: fold_query does not match decode"
    weights = torch.rand(*x.shape[:-2], 5, BLOCK, generator=torch.Generator().manual_seed(2)).softmax(-1)
    out, direct = codec.unfold_output(weights @ folded), weights @ decoded
    assert torch.allclose(out, direct, rtol=1e-4, atol=1e-5 * decoded.abs().max().item()), f"{codec} d={d}: unfold"


def storage_orders(codec: Codec, d: int) -> None:
    """Repacking into every registered order and back is the identity."""
    from tersekv.layout import ORDERS

    packed = codec.encode(sample(d))
    for order in filter(packed.layout.takes, ORDERS):
        there: Packed = repack(packed, order)
        assert there.layout.used_bytes == packed.layout.used_bytes, f"{codec} d={d}: order {order} changes the size"
        assert torch.equal(repack(there, "linear").data, packed.data), f"{codec} d={d}: order {order} is not exact"


def scales(codec: Codec, d: int) -> None:
    """Scales of tokens are not negative: kernels multiply weights by them and keep the product as unsigned bytes."""
    scale = read(codec.encode(sample(d)), "scale")
    assert scale is None or (scale >= 0).all(), f"{codec} d={d}: a token has a negative scale"
