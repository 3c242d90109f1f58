"""Decoding steps on a GPU: three launches, memory with room, graphs. `pytest -m gpu` on a GPU machine."""

from typing import Any

import numpy as np
import pytest
import torch
from stores import assert_same
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tersekv
from tersekv.device_tail import DeviceTail
from tersekv.errors import CacheError, InputError, ModelError
from tersekv.ops import cuda
from tersekv.spec import parse
from tersekv.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]
CUDA = torch.device("cuda")


def draw(b: int, h: int, g: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(b, n, heads, d, device=CUDA).to(dtype).transpose(1, 2) for heads in (h * g, h, h))
    return q, k, v


def on_device(store: Store) -> DeviceTail:
    tail = store.state[1]
    assert isinstance(tail, DeviceTail)
    return tail


@pytest.mark.parametrize("room", [None, 300])
@pytest.mark.parametrize(
    ("spec", "d", "g", "n", "dtype"),
    [
        ("rotated:bits=4", 128, 4, 1, torch.bfloat16),
        ("k=rotated:bits=4 v=rotated:bits=2 sink=0 recent=100", 64, 3, 1, torch.float16),
        ("rotated:bits=2 sink=70 recent=0", 128, 8, 1, torch.bfloat16),
        ("intn:bits=4", 128, 1, 3, torch.float32),
        ("k=intn:bits=2,axis=channel v=lloydmax:bits=3", 256, 4, 5, torch.bfloat16),
        ("rotated:bits=1", 64, 16, 16, torch.bfloat16),
        ("k=rotated:bits=2 v=trellis:bits=1", 128, 4, 1, torch.bfloat16),
        ("k=rotated:bits=3 v=trellis:bits=2", 64, 8, 7, torch.float16),
        ("rotated:bits=3 policy=queryaware observe=100", 128, 4, 1, torch.bfloat16),
        ("k=rotated:bits=4 v=trellis:bits=2 policy=queryaware observe=40", 64, 3, 2, torch.float16),
        ("rotated:bits=3 policy=queryaware observe=290", 128, 4, 1, torch.bfloat16),  # it asks until the end
    ],
)
def test_steps_are_those_of_the_tiers(spec: str, d: int, g: int, n: int, dtype: torch.dtype, room: int | None) -> None:
    """Attention as over the decoded tokens, and afterwards the same bytes as if all had been appended."""
    parsed, b, h, padding = parse(spec), 3, 2, np.array([0, 70, 9])
    stores = [Store(parsed, b, h, d, dtype, CUDA, room) for _ in range(3)]
    chunks = [draw(b, h, g, 201, d, dtype), *(draw(b, h, g, n, d, dtype) for _ in range(150 // n))]
    # Channels of keys and queries that want factors, each row others; powers of two, so that nothing rounds.
    uneven = 2.0 ** torch.randint(-3, 4, (b, h, 1, d // 2), device=CUDA).tile(2).to(dtype)
    on = 0
    for number, (q, k, v) in enumerate(chunks):
        if "queryaware" in spec:
            q, k = q / uneven.repeat_interleave(g, 1), k * uneven
        pads = padding if number == 0 else None
        stores[0].append(k, v, pads, (q, d**-0.5))
        slow = stores[1].extend(q, k, v, pads, d**-0.5, "decoded").float()
        torch.full((2**22,), torch.nan, device=CUDA)
        fast = stores[2].extend(q, k, v, pads, d**-0.5).float()
        assert number == 0 or (slow - fast).norm() <= 0.03 * slow.norm()
        assert number == 0 or (slow - fast).abs().max() <= 0.1 * slow.abs().max()
        on += isinstance(stores[2].state[1], DeviceTail)
    assert on >= 0.8 * len(chunks)
    assert_same(stores[0].tiers, stores[2].tiers)
    factors = stores[2].tiers.packed["packed"].factors
    assert factors is None or (factors != 1).float().mean() > 0.5


def test_a_step_can_be_taken_back_until_its_block_is_packed() -> None:
    store = Store(parse("rotated:bits=3"), 1, 2, 64, torch.bfloat16, CUDA, 1000)
    store.extend(*draw(1, 2, 2, 150, 64, torch.bfloat16), None, 0.125)
    steps, early = [draw(1, 2, 2, 1, 64, torch.bfloat16) for _ in range(70)], None
    for number, step in enumerate(steps):
        before = store.state
        early = early or before
        first = store.extend(*step, None, 0.125)
        if number in (3, 50, 60):
            again = store.at(before)
            assert again.lengths[0] == store.lengths[0] - 1
            assert (again.extend(*step, None, 0.125) - first).abs().max() < 0.05
            assert_same(store.at(store.state).tiers, again.tiers)
            store.extend(*step, None, 0.125)
    with pytest.raises(CacheError, match="packed since"):
        assert store.at((on_device(store).tiers, on_device(store), 0)).tiers


def test_what_is_not_finite_is_never_packed() -> None:
    store = Store(parse("rotated:bits=4"), 1, 1, 64, torch.float16, CUDA)
    store.extend(*draw(1, 1, 1, 100, 64, torch.float16), None, 0.125)
    q, k, v = draw(1, 1, 1, 1, 64, torch.float16)
    with pytest.raises(InputError, match="not finite"):
        for number in range(70):
            store.extend(q, k * torch.inf if number == 3 else k, v, None, 0.125)
    assert store.state[0].packed["packed"].lengths.max() == 0


def tiny(layers: int = 2, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=layers, head_dim=64, **(sizes | options))
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(CUDA, torch.bfloat16)


@pytest.mark.parametrize("room", [None, 1000])
@pytest.mark.parametrize("padded", [False, True])
def test_a_graph_says_what_eager_says_token_by_token(room: int | None, padded: bool) -> None:
    """Through several blocks, and with no room asked for through several captures."""
    model, ids = tiny(), torch.randint(1, 97, (3, 200), device=CUDA)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :77] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    steps = 700 if room is None else 300
    with tersekv.attached(model), torch.inference_mode():
        caches = [tersekv.cache(model, "rotated:bits=4", room) for _ in range(2)]
        said = [
            model(ids, past_key_values=c, attention_mask=mask, position_ids=positions).logits[:, -1] for c in caches
        ]
        graphed, uncaptured = tersekv.GraphedStep(model, caches[1]), 0
        place = positions[:, -1:]
        for _ in range(steps):
            assert torch.equal(*said)
            token, place = said[0].argmax(-1), place + 1
            eager = model(token[:, None], past_key_values=caches[0], position_ids=place).logits[:, -1]
            said = [eager, graphed(token).clone()]
            uncaptured += graphed.forward.graph is None
        assert uncaptured > 1 if room is None else uncaptured == 1
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert_same(one.store.tiers, other.store.tiers)
        assert one.slots.total == other.slots.total == 200 + steps


def test_a_cache_in_a_graph_can_be_copied_cropped_and_saved(tmp_path: Any) -> None:
    model, ids = tiny(), torch.randint(1, 97, (1, 200), device=CUDA)
    with tersekv.attached(model), torch.inference_mode():
        cache = tersekv.cache(model, "rotated:bits=4", 600)
        model(ids, past_key_values=cache)
        graphed = tersekv.GraphedStep(model, cache)
        for token in range(1, 50):
            graphed(torch.tensor([token % 97], device=CUDA))
        other = cache.copy()
        tersekv.save(cache, tmp_path / "cache.safetensors", model)
        assert tersekv.load(tmp_path / "cache.safetensors", model).get_seq_length() == 249
        for token in range(1, 100):
            graphed(torch.tensor([token % 97], device=CUDA))
        cache.crop(-99)
        assert cache.get_seq_length() == other.get_seq_length() == 249
        said = [tersekv.GraphedStep(model, c)(torch.tensor([5], device=CUDA)) for c in (cache, other)]
        assert (said[0] - said[1]).abs().max() < 0.1
        assert cache.report().held > 0


def test_refusals() -> None:
    model = tiny()
    with tersekv.attached(model):
        cache = tersekv.cache(model)
        with pytest.raises(InputError, match="Run the model once"):
            tersekv.GraphedStep(model, cache)
    with pytest.raises(ModelError, match="not attached"):
        tersekv.GraphedStep(model, cache)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_where_their_tensors_are() -> None:
    """The second device's, while the first is current."""
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        store = Store(parse("rotated:bits=4"), 1, 2, 64, torch.bfloat16, torch.device(device))
        for n in (200, *[1] * 70):
            q, k, v = (torch.randn(1, h, n, 64).to(device, torch.bfloat16) for h in (4, 2, 2))
            outputs.append(store.extend(q, k, v, None, 0.125).cpu())
    half = len(outputs) // 2
    assert all(torch.equal(one, other) for one, other in zip(outputs[:half], outputs[half:], strict=True))


def test_making_room_holds_the_pages_of_one_layer_twice_and_not_of_all() -> None:
    model = tiny(layers=8, max_position_embeddings=4096)
    cache = tersekv.cache(model, "rotated:bits=4")
    with torch.inference_mode(), tersekv.attached(model):
        model(input_ids=torch.arange(3000, device=CUDA)[None] % 97, past_key_values=cache, logits_to_keep=1)
        held = sum(layer.opened().tiers.packed["packed"].pool.nbytes for layer in cache.layers)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=torch.ones(1, 1, dtype=torch.int64, device=CUDA), past_key_values=cache)
        assert torch.cuda.max_memory_allocated() - before < 0.6 * held  # an eighth, the room, and what a pass needs
        cache.crop(-11)
        assert cache.get_seq_length() == 2990
