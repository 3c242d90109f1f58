"""What a layer keeps account of while its decoding steps are launches, with a stand-in for the launches, anywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from stores import assert_same
from torch import Tensor

from tersekv import ops
from tersekv.asking_tail import AskingTail
from tersekv.device_steps import refusal, tail_behind
from tersekv.device_tail import DeviceTail
from tersekv.spec import parse
from tersekv.store import Store

D, H, GROUP, SCALE = 64, 2, 3, 0.125


def draw(b: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(b, heads, n, D) for heads in (H * GROUP, H, H))
    # Channels that want factors, each head others; powers of two, so that nothing rounds.
    uneven = 2.0 ** (torch.arange(H * D // 2).view(1, H, 1, D // 2).tile(2) % 5 - 2)
    return q / uneven.repeat_interleave(GROUP, 1), k * uneven, v


def launched(q: Tensor, k: Tensor, v: Tensor, pages: Any, dense: ops.StepTokens, *_: Any) -> Tensor:
    """The tokens to their slots, as `store.cu` does it. Nobody attends."""
    n, (b, h, slots, _) = k.shape[2], dense.ring_k.shape
    grouped = q.unflatten(1, (h, -1)).transpose(2, 3)
    for token in range(n):
        at = (dense.next.long() + token) % slots
        for ring, x in ((dense.ring_k, k), (dense.ring_v, v), (dense.ring_q, grouped)):
            if ring is not None:
                ring[torch.arange(b)[:, None], torch.arange(h), at] = x[:, :, token]
    dense.next.add_(n)
    return q


def places(tail: DeviceTail) -> list[int]:
    """Of all that a graph of launches reads and writes."""
    pages = (getattr(tail.pages, name) for name in ("pool", "table", "lengths"))
    return [x.data_ptr() for x in (*vars(tail.dense).values(), *pages, *tail.multipliers) if x is not None]


@pytest.fixture(autouse=True)
def _a_stand_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "step_on_device", launched)
    monkeypatch.setattr(ops, "queries_step", lambda q: True)
    monkeypatch.setattr(ops, "pages_step", lambda pages: True)


SPECS = {
    "window": "rotated:bits=4 sink=3 recent=20",
    "asking to the end": "rotated:bits=3 policy=queryaware observe=1000",
    "asking for a while": "k=rotated:bits=2 v=rotated:bits=4 policy=queryaware observe=150 recent=70",
    "asked before": "rotated:bits=3 policy=queryaware observe=15",
    "a preset": "terse4",
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("prompt", "padding"), [(20, [0, 9, 2]), (150, [0, 70, 3])])
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_tiers_as_token_by_token(spec: str, prompt: int, padding: list[int], n: int) -> None:
    parsed = parse(SPECS[spec])
    one, other = (Store(parsed, 3, H, D, torch.float32, torch.device("cpu")) for _ in range(2))
    q, k, v = draw(3, prompt)
    for store in (one, other):
        store.append(k, v, np.array(padding), (q, SCALE))
    tail = tail_behind(other.tiers, parsed.policy, prompt + 400, q[:, :, :n])
    assert isinstance(tail, AskingTail if "asking" in spec or (spec == "a preset") else DeviceTail)
    where = places(tail)
    count = 0
    for _ in range(350 // n):
        fresh = draw(3, n)
        one.append(*fresh[1:], None, (fresh[0], SCALE))
        assert tail.claim(count, n)
        tail.step(*fresh, SCALE)
        count += n
    settled = tail.settled(parsed.policy, count)
    assert_same(one.tiers, settled)
    assert places(tail) == where
    _same_beside(one, settled)
    packed = settled.packed["packed"]
    now = ops.multipliers(packed.k.rotation, packed.v.rotation, D, torch.device("cpu"), packed.factors)
    assert all(torch.equal(x, y) for x, y in zip(tail.multipliers, now, strict=True) if x is not None)
    if spec == "asking to the end":
        assert packed.factors is not None and (packed.factors != 1).float().mean() > 0.5


def _same_beside(store: Store, tiers: Any) -> None:
    """What the policy knows of each row goes on as if there had been no launches."""
    for mine, yours in ((store.tiers, tiers), (store.tiers.packed["packed"], tiers.packed["packed"])):
        for name in ("counted", "balanced", "asked", "factors"):
            if getattr(mine, name, None) is not None:
                assert torch.equal(getattr(mine, name), getattr(yours, name)), name


def test_an_early_state_is_returned_to_with_the_queries_of_its_tokens() -> None:
    parsed = parse(SPECS["asking to the end"])
    one, other = (Store(parsed, 1, H, D, torch.float32, torch.device("cpu")) for _ in range(2))
    q, k, v = draw(1, 30)
    for store in (one, other):
        store.append(k, v, None, (q, SCALE))
    tail = tail_behind(other.tiers, parsed.policy, 200, q[:, :, :1])
    assert tail is not None
    for count in range(20):
        fresh = draw(1, 1)
        if count < 12:
            one.append(*fresh[1:], None, (fresh[0], SCALE))
        assert tail.claim(count, 1)
        tail.step(*fresh, SCALE)
    settled = tail.settled(parsed.policy, 12)
    assert_same(one.tiers, settled)
    _same_beside(one, settled)


def test_a_policy_that_does_more_is_refused() -> None:
    for spec, why in (("rotated:bits=4 policy=anchors", "does more"), ("rotated:bits=4 sink=9", "first tokens")):
        store = Store(parse(spec), 1, H, D, torch.float32, torch.device("cpu"))
        q, k, v = draw(1, 5)
        store.append(k, v, None, (q, SCALE))
        assert why in refusal(store.tiers, store.spec.policy)
