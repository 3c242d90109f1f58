"""Native attention against fp64 on pages of random codes, on every instruction set that runs here."""

from itertools import pairwise

import pytest
import torch
from native_cases import Case, make_case
from native_truth import Truth, compare, truth
from torch import Tensor

from tersekv.ops import attention as reference
from tersekv.ops import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
RUN = [name for name, runs, _ in (native.isas() if native.missing() is None else []) if runs]

ALL = "scale:fp16 zero:fp16 channel_scale:fp16 channel_zero:fp16"
FIRST = "channel_scale:fp16 channel_zero:fp16 scale:log8"
CHANNELS = "{0} positive channel_scale/{1}:fp16 channel_zero/{1}:fp16"
TOKENS = "{0} positive scale/{1}:fp16 zero/{1}:fp16"
SIDES = {
    "1/2 bits": ("1 normal scale:log8", "2 normal scale:log8"),
    "2/3 bits, mean": ("2 normal scale:log8 channel_zero:int8", "3 normal scale:fp16"),
    "3/4 bits, zero": ("3 normal scale:log8 channel_zero:int8", "4 uniform scale:fp16 zero:fp16"),
    "4/1 bits, bf16": ("4 uniform scale:fp16 zero:fp16", "1 normal scale:bf16"),
    "channels": ("4 uniform channel_scale:fp16 channel_zero:fp16", "4 uniform channel_scale:fp32 channel_zero:bf16"),
    "8/8 bits": ("8 uniform scale:fp16 zero:fp16", "8 normal scale:fp32"),
    "3/2 bits, all": (f"3 normal {ALL}", f"2 normal {ALL}"),
    "8/3 bits, all": (f"8 normal {ALL}", f"3 uniform {ALL}"),
    "trellis 1/2 bits": ("1 trellis scale:log8", "2 trellis scale:fp16 channel_zero:int8"),
    "trellis 3/4 bits": ("3 trellis scale:fp16 channel_zero:fp16", "4 trellis scale:log8"),
    "trellis 4/1 bits": ("4 trellis scale:log8 channel_zero:int8", "1 trellis"),
    "trellis 2/3 bits": ("2 trellis scale:log8 channel_zero:int8", "3 trellis scale:log8"),
    "trellis/grid": ("2 trellis scale:log8", "3 normal scale:log8"),
    "fp16/trellis": ("dense fp16", "2 trellis scale:log8"),
    "no scale": ("4 normal", "2 uniform channel_zero:bf16"),
    "fp32/bf16": ("dense fp32", "dense bf16"),
    "fp16/3 bits": ("dense fp16", "3 normal scale:log8"),
    "2 bits/fp32": ("2 normal scale:log8 channel_zero:int8", "dense fp32"),
    "1 bit/fp16": (f"1 uniform {ALL}", "dense fp16"),
    "vq": ("vq 8x8 scale:log8 channel_zero:int8", "vq 8x8 scale:log8"),
    "vq of 16": ("vq 16x6 scale:log8 channel_zero:int8", "vq 16x8 scale:fp16"),
    "vq, two stages": ("vq 16x8x2 scale:log8", "vq 8x6x2 scale:log8 channel_zero:int8"),
    "vq, own books": ("vq 16x6 own", "vq 8x5 own"),
    "vq, own books, two stages": (
        "vq 4x4x2 own scale:fp16",
        "vq 16x3x2 own scale:fp16 channel_zero:fp16",
    ),
    "vq/grid": ("vq 4x8 scale:log8", "3 normal scale:log8"),
    "grid/vq": ("4 uniform scale:fp16 zero:fp16", "vq 4x8 scale:log8"),
    "vq/fp16": ("vq 8x2", "dense fp16"),
    "groups/vq": (CHANNELS.format(2, 32), "vq 8x8 own scale:log8"),
    "groups, as KIVI": (CHANNELS.format(2, 32), TOKENS.format(2, 16)),
    "groups of 16": (CHANNELS.format(4, 16), TOKENS.format(3, 16)),
    "groups, the other way": (TOKENS.format(4, 16), CHANNELS.format(3, 32)),
    "positive codes": ("2 positive scale:fp16 zero:fp16", "4 positive scale:fp16 zero:fp16"),
    "groups, scales only": ("3 normal channel_scale/16:fp32", "1 normal scale/16:log8"),
    "groups, zeros only": ("1 normal zero/16:bf16", "4 normal channel_zero/16:fp16"),
    "groups of 8 bits": (CHANNELS.format(8, 32), TOKENS.format(8, 16)),
    "groups/zero": (CHANNELS.format(3, 32), "4 uniform scale:fp16 zero:fp16"),
    "zero/groups": ("4 uniform scale:fp16 zero:fp16", TOKENS.format(1, 16)),
    "groups/trellis": (TOKENS.format(2, 16), "2 trellis scale:log8"),
    "fp16/groups": ("dense fp16", CHANNELS.format(2, 16)),
    "channels first": (f"4 uniform first=channel {FIRST}", f"3 uniform first=channel {FIRST}"),
    "channels first/groups": ("8 uniform first=channel channel_zero:fp16 scale:log8", TOKENS.format(4, 16)),
    "mean/channels first": (
        "2 normal scale:log8 channel_zero:int8",
        "8 uniform first=channel channel_scale:fp16 scale:log8",
    ),
}
RAGGED = [[0, 1], [63, 65]]
SHAPES = {  # d, g, n, lengths
    "d64": (64, 1, 1, RAGGED),
    "d80 g3 n2": (80, 3, 2, [[64, 130], [1, 0]]),
    "d96 g16 n5": (96, 16, 5, [[65, 63]]),
    "d128 g4": (128, 4, 1, [[127], [321]]),
    "d256 g2 n17": (256, 2, 17, [[66]]),
    "d64 g4 n65": (64, 4, 65, [[129]]),
    "splits": (64, 3, 1, [[1024, 1025], [2049, 1]]),
}


def agree(route: dict[str, tuple[Tensor, Tensor]], bound: Truth, exact: Truth) -> None:
    """Integers are the same everywhere; only a weight at the edge of a step may fall to its other side."""
    for (a, one), (b, other) in pairwise(route.items()):
        apart = (one[0] - other[0]).abs()
        allowed = bound.out_bound / 5 + 2 * exact.out_bound
        assert (apart <= allowed).all(), (
            f"{a} and {b} are {(apart - allowed).max()} further apart than rounding explains"
        )
        assert apart.mean() <= bound.out_bound.mean() / 100 + exact.out_bound.mean(), f"{a} and {b} differ too often"


def check(case: Case) -> None:
    exact, int8 = truth(case, exact=True), truth(case, exact=False)
    compare(reference.attend_pages(case.q, case.linear, case.scale), exact, "reference")
    routes: dict[bool, dict[str, tuple[Tensor, Tensor]]] = {True: {}, False: {}}
    for isa in RUN:
        for is_exact, right in ((True, exact), (False, int8)):
            got = native.attend_pages(case.q, case.native, case.scale, is_exact, isa)
            compare(got, right, f"{isa} {'exact' if is_exact else 'int8'}")
            routes[is_exact][isa] = got
    for is_exact, right in ((True, exact), (False, int8)):
        agree(routes[is_exact], right, exact)


PAGES = [(sides, shape) for sides in SIDES for shape in SHAPES if "trellis" not in sides or SHAPES[shape][0] % 32 == 0]


@pytest.mark.parametrize(("sides", "shape"), PAGES)
def test_pages(sides: str, shape: str) -> None:
    check(make_case(*SIDES[sides], *SHAPES[shape]))


@pytest.mark.parametrize("g", [5, 6, 7, 8, 9, 12, 16])
def test_every_group(g: int) -> None:
    check(make_case(*SIDES["2/3 bits, mean"], 64, g, 1, RAGGED))


WIDTHS = [(64, 32, 4), (96, 48, 1), (128, 32, 4), (128, 64, 9), (256, 32, 2), (512, 16, 1)]


def test_books_at_the_largest_head_dim() -> None:
    check(make_case("vq 4x8x2 scale:log8", "vq 4x8x2 scale:log8", 512, 8, 1, [[70]]))


@pytest.mark.parametrize(("d", "each", "g"), WIDTHS)
def test_groups_of_every_width(d: int, each: int, g: int) -> None:
    check(make_case(CHANNELS.format(2, 32), TOKENS.format(2, each), d, g, 1, RAGGED))
    check(make_case(TOKENS.format(4, each), CHANNELS.format(4, 16), d, g, 1, [[130]]))


@pytest.mark.parametrize("isa", ["amx", "avx512", "avxvnni", "avx2", "neon", "portable"])
def test_instruction_set_runs(isa: str) -> None:
    """Names in the summary what was not tested above."""
    if isa not in RUN:
        pytest.skip(f"{isa} does not run on this processor, or is not in this build")


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("sides", ["2/3 bits, mean", "groups, as KIVI", "channels first"])
def test_a_row_does_not_depend_on_those_beside_it(sides: str, isa: str) -> None:
    """Bit for bit up to eight rows; more are added up in another order, and so are those of plain loops, as compilers
    like. Some rows have scores that grow far above the first block's, so that their exponentials are computed again and
    those of the others with them."""
    case = make_case(*SIDES[sides], 64, 1, 64, [[700, 320]])
    q = case.q * torch.where(torch.arange(64) % 3 == 0, 30, 1)[:, None]

    def by(n: int) -> Tensor:
        parts = (native.attend_pages(part, case.native, case.scale, False, isa)[0] for part in q.split(n, 2))
        return torch.cat(list(parts), 2)

    alone = by(1)
    for n in (2, 3, 4, 5, 8, 9, 64):
        exactly = n <= 8 and isa != "portable"
        assert torch.allclose(by(n), alone, rtol=0, atol=0 if exactly else 2e-5)


def test_weights_far_below_the_largest() -> None:
    """A block whose exponentials are denormal must count as nothing, not as infinity over infinity."""
    case = make_case("4 uniform", "4 uniform scale:fp16", 64, 2, 1, [[128]])
    first = slice(*case.native.k_layout.span("codes").indices(10**6)[:2])
    case.native.pool[case.native.table[0, 0, 0], first] = 0x00  # every key of block 0 is -8, of block 1 it is 7
    case.native.pool[case.native.table[0, 0, 1], first] = 0xFF
    for apart in (80, 84, 86, 87, 90):
        q = torch.full((1, 2, 1, 64), apart / (15 * 64))
        one = native.attend_pages(q, case.native, 1.0, True, RUN[-1])
        for isa in RUN:
            out, lse = native.attend_pages(q, case.native, 1.0, False, isa)
            assert torch.isfinite(out).all() and torch.isfinite(lse).all()
            assert (out - one[0]).abs().max() < 0.1, f"{isa}, {apart} nats apart"


def test_queries_of_almost_zero() -> None:
    case = make_case(*SIDES["1/2 bits"], 64, 2, 1, [[128]])
    for size in (0.0, 1e-45, 1e-38, 1e-30):
        whole = native.attend_pages(torch.full_like(case.q, size), case.native, 1.0, True)
        for isa in RUN:
            out, _ = native.attend_pages(torch.full_like(case.q, size), case.native, 1.0, False, isa)
            assert (out - whole[0]).abs().max() < 0.05


def test_strided_and_16_bit_queries() -> None:
    case = make_case(*SIDES["2/3 bits, mean"], 64, 2, 3, RAGGED)
    right = native.attend_pages(case.q, case.native, case.scale)
    strided = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(native.attend_pages(strided, case.native, case.scale)[0], right[0])
    low = case.q.bfloat16()
    assert torch.equal(
        native.attend_pages(low, case.native, case.scale)[0],
        native.attend_pages(low.float(), case.native, case.scale)[0],
    )


def test_nothing_at_all() -> None:
    case = make_case(*SIDES["1/2 bits"], 64, 2, 1, [[0, 0], [0, 0]])
    for isa in RUN:
        out, lse = native.attend_pages(case.q, case.native, 1.0, False, isa)
        assert not out.any() and (lse == -torch.inf).all()
