"""A decoding step in one native call: as its parts one by one, and never at the expense of another state."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_attend import RUN
from torch import Tensor

from tersekv import InputError
from tersekv.ops import native
from tersekv.spec import parse
from tersekv.store import Store
from tersekv.tail import ROOM, Tail

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
H, G = 3, 3
SPECS = [
    "rotated:bits=4",
    "k=rotated:bits=2,seed=7 v=rotated:bits=3 recent=0",
    "k=lloydmax:bits=4 v=rotated:bits=4",
    "k=intn:bits=4,axis=channel v=none",
    "none:dtype=fp32 sink=0",
    "turboquant:bits=4",
    "twoaxis:bits=3",
]


def drawn(n: int, d: int = 64, b: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as models hand them over: (b, n, heads, d), seen the other way round."""
    q, k, v = (torch.randn(b, n, heads, d).to(dtype).transpose(1, 2) for heads in (H * G, H, H))
    return q, k, v


def filled(spec: str, t: int, d: int = 64, b: int = 1, dtype: torch.dtype = torch.float32) -> Store:
    store = Store(parse(spec), b, H, d, dtype, torch.device("cpu"))
    _, k, v = drawn(t, d, b, dtype)
    store.append(k, v, None)
    return store


def one_by_one(store: Store, q: Tensor, k: Tensor, v: Tensor, exact: bool, isa: str = "") -> Tensor:
    """The same attention from separate calls, in fp32."""
    none, tiers = torch.zeros(len(q), dtype=torch.int64), store.tiers
    dense = [(tier.k, tier.v, torch.from_numpy(tier.lengths), False) for tier in tiers.dense.values()]
    dense.append((k, v, torch.full(k.shape[:2], k.shape[2]), True))
    parts = [native.attend_dense(q, x, y, lengths, 0.125, none, causal, isa) for x, y, lengths, causal in dense]
    for tier in tiers.packed.values():
        out, lse = native.attend_pages(tier.k.fold_query(q.float()), tier.pages, 0.125, exact, isa)
        parts.append((tier.v.unfold_output(out), lse))
    return native.merge(parts)[0]


def near(got: Tensor, right: Tensor, values: float) -> None:
    """Weights are sums of products in another order, outputs averages of values, rounded to their type once."""
    bound = (torch.finfo(got.dtype).eps * right.abs()).clamp(min=64 * torch.finfo(torch.float32).eps * values)
    assert ((got.float() - right).abs() <= bound).all()


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_is_its_parts(spec: str, dtype: torch.dtype, isa: str) -> None:
    for d, n, b, t in ((64, 1, 1, 300), (80, 2, 2, 200), (128, 5, 1, 140), (64, 1, 1, 2)):
        for exact in (True, False):
            store, (q, k, v) = filled(spec, t, d, b, dtype), drawn(n, d, b, dtype)
            tail = Tail.behind(store.tiers, store.spec.policy, q)
            assert tail is not None and tail.claim(0, n)
            got = native.step(q, k, v, tail.parts, tail.native, 0, 0.125, exact, isa)
            assert got is not None and got.dtype == dtype and got.transpose(1, 2).is_contiguous()
            near(got, one_by_one(store, q, k, v, exact, isa), 5)
            assert torch.equal(tail.k[:, :, :n], k) and torch.equal(tail.v[:, :, :n], v)


def test_a_step_of_ragged_sequences() -> None:
    store = Store(parse("rotated:bits=3"), 2, H, 64, torch.float32, torch.device("cpu"))
    _, k, v = drawn(300, b=2)
    store.append(k, v, np.array([0, 213]))
    q, k, v = drawn(1, b=2)
    right = one_by_one(store, q, k, v, True)
    got = store.step(q, k, v, 0.125, "exact")
    assert got is not None
    near(got, right, 5)
    assert store.lengths.tolist() == [301, 88]


@pytest.mark.parametrize("policy", ["", " policy=queryaware observe=150"])
@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.integers(1, 20), min_size=1, max_size=25))
def test_any_steps_store_what_one_append_does(policy: str, chunks: list[int]) -> None:
    torch.manual_seed(sum(chunks))
    q, k, v = drawn(64 + sum(chunks))
    once = Store(parse(f"rotated:bits=3 sink=3 recent=20{policy}"), 1, H, 64, torch.float32, torch.device("cpu"))
    often, start = once.at(once.state), 0
    once.append(k, v, None, (q, 0.125))
    for n in (64, *chunks):
        often.extend(*(x[:, :, start : start + n] for x in (q, k, v)), None, 0.125)
        start += n
        assert often.lengths.tolist() == [start]
    assert_same(once, often)


def assert_same(one: Store, other: Store) -> None:
    for a, b in zip(one.tiers.all().values(), other.tiers.all().values(), strict=True):
        assert np.array_equal(a.lengths, b.lengths)
        x, y = a.tensors(), b.tensors()
        if "pool" in x:  # pages lie in the order in which they came
            x["pool"], y["pool"] = (tier.pool[tier.table.long()] for tier in (a, b))
            del x["table"], y["table"]
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_queries_wait_with_their_tokens_as_long_as_a_policy_asks_for_them() -> None:
    """Decoding is one native call from the start, whose tokens are packed for the queries that came with them."""
    store = Store(parse("rotated:bits=3 policy=queryaware observe=250"), 1, H, 64, torch.float32, torch.device("cpu"))
    other = store.at(store.state)
    for mine in (store, other):
        torch.manual_seed(0)
        q, k, v = drawn(100)
        mine.append(k, v, None, (q, 0.125))
    kept = []
    for _ in range(300):
        q, k, v = drawn(1)
        before = other.state
        slow = other.extend(q, k, v, None, 0.125, "decoded")
        assert other.state[1] is None and before is not other.state
        fast = store.step(q, k, v, 0.125, "exact")
        assert fast is not None and torch.allclose(fast, slow, atol=1e-4)
        tail = store.state[1]
        kept.append(isinstance(tail, Tail) and tail.q is not None)
    assert kept[10] and kept[145] and not kept[160] and not kept[-1]
    assert_same(store, other)


@pytest.mark.parametrize("keep", [128, 150, 200])
def test_waiting_tokens_evict_nothing_late(keep: int) -> None:
    spec = f"rotated:bits=4 policy=streaming keep={keep}"
    stepped = filled(spec, 300)
    appended = stepped.at((stepped.tiers, None, 0))
    for _ in range(150):
        q, k, v = drawn(1)
        assert stepped.step(q, k, v, 0.125) is not None
        appended.append(k, v, None)
        tiers, _, waiting = stepped.state
        held = sum(tier.lengths for tier in tiers.all().values()) + waiting
        assert (held == sum(tier.lengths for tier in appended.tiers.all().values())).all()


def test_every_state_keeps_its_tokens() -> None:
    """Rollback, forks and forks of forks that write on at the same place, all of them over one tail."""
    store = filled("rotated:bits=3", 100)
    tokens = [drawn(1) for _ in range(12)]
    for token in tokens[:4]:
        store.step(*token, 0.125)
    fork, early = store.at(store.state), store.at(store.state)
    tail = store.state[1]
    for token in tokens[4:7]:
        store.step(*token, 0.125)  # goes on in place
    assert store.state[1] is tail
    for token in tokens[7:10]:
        fork.step(*token, 0.125)  # finds its place taken
    assert fork.state[1] is not tail
    late = store.at(store.state)
    for mine, last in ((store, tokens[10]), (late, tokens[11]), (early, tokens[11])):
        mine.step(*last, 0.125)
    for got, path in ((store, [*range(7), 10]), (fork, [*range(4), *range(7, 10)]), (late, [*range(7), 11]),
                      (early, [*range(4), 11])):  # fmt: skip
        _, k, v = got.decoded(), *(torch.cat([tokens[i][side] for i in path], 2) for side in (1, 2))
        assert torch.equal(got.decoded().k[:, :, 100:], k) and torch.equal(got.decoded().v[:, :, 100:], v)


def test_one_of_many_threads_may_write_on() -> None:
    tail = Tail(filled("rotated:bits=4", 100).tiers, ROOM)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: tail.claim(0, 1), range(64)))
    assert sum(claims) == 1
    assert not tail.claim(1, ROOM) and tail.claim(1, ROOM - 1)


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_stored_of_tokens_that_are_not_finite(value: float, side: int) -> None:
    for dtype in native.DTYPES:
        store = filled("rotated:bits=4", 100, dtype=dtype)
        before = store.at(store.state)
        token = drawn(2, dtype=dtype)
        token[side][0, 2, 1, 63] = value
        assert store.step(*token, 0.125) is None
        assert_same(before, store)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_spoils_its_own_output(value: float) -> None:
    for dtype in native.DTYPES:
        store, (q, k, v) = filled("rotated:bits=4", 100, dtype=dtype), drawn(1, dtype=dtype)
        q[0, 2, 0, 5] = value
        out = store.step(q, k, v, 0.125)
        assert out is not None
        assert torch.isnan(out).all(-1).flatten().tolist() == [head == 2 for head in range(H * G)]


def test_what_a_step_leaves_to_others() -> None:
    """No tokens yet, too many of them, a block that becomes due among them, a codec with a fold of its own."""
    token = drawn(1)
    assert Store(parse("rotated:bits=4"), 1, H, 64, torch.float32, torch.device("cpu")).step(*token, 0.125) is None
    assert filled("rotated:bits=4", 100).step(*drawn(17), 0.125) is None
    assert filled("rotated:bits=4", 4 + 127).step(*drawn(2), 0.125) is None
    begun = filled("rotated:bits=4", 100)
    assert begun.step(*token, 0.125) is not None and begun.step(*token, 0.125, "decoded") is None
    assert filled("intn:bits=5", 100).step(*token, 0.125) is None
    assert filled("rotated:bits=4", 100).step(token[0], token[1].bfloat16(), token[2], 0.125) is None


def test_a_codec_that_folds_in_its_own_way_is_folded_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersekv.codecs.rotated import Rotated

    right = filled("rotated:bits=4", 300)
    other = right.at(right.state)
    token = drawn(1)
    expected = right.extend(*token, None, 0.125, "exact")
    before = Rotated.fold_query
    monkeypatch.setattr(Rotated, "fold_query", lambda self, q: before(self, q))
    other.tiers = other.tiers.select(torch.arange(1))  # parts are made anew
    assert other.step(*token, 0.125, "exact") is None
    assert torch.allclose(other.extend(*token, None, 0.125, "exact"), expected, atol=1e-6)


@pytest.mark.parametrize("first", [torch.inference_mode, nullcontext])
def test_inference_mode_may_begin_or_end_between_steps(first: type) -> None:
    store = filled("rotated:bits=4", 100)
    with first():
        assert store.step(*drawn(1), 0.125) is not None
    with nullcontext() if first is torch.inference_mode else torch.inference_mode():
        assert store.step(*drawn(1), 0.125) is not None
    q, k, v = (x.requires_grad_() for x in drawn(1))
    assert store.step(q, k, v, 0.125) is not None
    assert not store.decoded().k.requires_grad


def test_wrong_steps_are_refused() -> None:
    tail = Tail(filled("rotated:bits=4", 100).tiers, 4)
    q, k, v = drawn(1)
    with pytest.raises(InputError, match="Tokens 4 to 5 of a tail with room for 4"):
        native.step(q, k, v, tail.parts, tail.native, 4, 0.125, False)
    with pytest.raises(InputError, match="Queries of 2 sequences, keys of 1"):
        native.step(q.repeat(2, 1, 1, 1), k, v, tail.parts, tail.native, 0, 0.125, False)
    with pytest.raises(InputError, match="8 query heads over 3 KV heads"):
        native.step(q[:, :8], k, v, tail.parts, tail.native, 0, 0.125, False)
    with pytest.raises(InputError, match="Queries of head_dim 128, keys of 64"):
        native.step(torch.cat((q, q), 3), k, v, tail.parts, tail.native, 0, 0.125, False)
    with pytest.raises(InputError, match=r"\(1, 32\) at head_dim 64 and"):
        native.pages_part(filled("rotated:bits=4", 200).tiers.packed["packed"].pages, torch.ones(1, 32))
    with pytest.raises(InputError, match=r'Instruction set "sse9" does not run here'):
        native.step(q, k, v, tail.parts, tail.native, 0, 0.125, False, "sse9")
