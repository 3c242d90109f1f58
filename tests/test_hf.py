"""The transformers host on tiny random models of each family: packed against dense, in every way a user generates."""

import numpy as np
import pytest
import torch
from conftest import SMALL, make_model
from hosting import PROMPT, dense, forward, lengths, tolerance
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import InputError
from tersekv.hf.cost import head_dim
from tersekv.ops import native


@pytest.mark.parametrize("route", ["fused", "decoded"])
def test_exact_pages_are_the_dense_cache(any_model: PreTrainedModel, ids: Tensor, route: str) -> None:
    """fp32 pages lose nothing: every chunking must give the dense logits."""
    expected = dense(any_model, ids)
    with tersekv.attached(any_model, route):
        for chunks in ([PROMPT], [100, 1, 1, 60, 138]):
            cache = tersekv.cache(any_model, "none:dtype=fp32")
            got = torch.cat([forward(any_model, cache, part) for part in ids.split(chunks, 1)], 1)
            assert (got - expected).abs().max() <= tolerance(expected)
            assert cache.get_seq_length() == PROMPT


@pytest.mark.parametrize(
    "spec", ["rotated:bits=4", "rotated:bits=2 prefill=packed", "k=intn:bits=4,axis=channel v=lloydmax:bits=3"]
)
def test_three_routes_agree(any_model: PreTrainedModel, ids: Tensor, spec: str) -> None:
    logits = {}
    for route in ("exact", "decoded"):
        cache = tersekv.cache(any_model, spec)
        with tersekv.attached(any_model, route):
            logits[route] = torch.cat([forward(any_model, cache, part) for part in ids.split(75, 1)], 1)
    assert (logits["exact"] - logits["decoded"]).abs().max() <= tolerance(logits["exact"])
    if "packed" not in spec:
        cache = tersekv.cache(any_model, spec)
        with pytest.warns(UserWarning, match="not attached"):
            plain = torch.cat([forward(any_model, cache, part) for part in ids.split(75, 1)], 1)
        assert (logits["exact"] - plain).abs().max() <= tolerance(plain)


def test_packed_layers_really_lose_something(any_model: PreTrainedModel, ids: Tensor) -> None:
    """The routes above would also agree if nothing were packed."""
    with tersekv.attached(any_model):
        got = forward(any_model, tersekv.cache(any_model, "rotated:bits=2 prefill=packed"), ids)
    assert (got - dense(any_model, ids)).abs().max() > 100 * tolerance(got)


def test_left_padded_batch(any_model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    alone = dense(any_model, ids[1:, 77:])
    with tersekv.attached(any_model):
        cache = tersekv.cache(any_model, "none:dtype=fp32")
        parts = []
        for start, stop in ((0, 50), (50, 130), (130, 131), (131, PROMPT)):  # padding spans two chunks
            parts.append(forward(any_model, cache, ids[:, start:stop], mask[:, :stop]))
        got = torch.cat(parts, 1)
    assert (got[0] - dense(any_model, ids[:1])[0]).abs().max() <= tolerance(got)
    # positions are the host's: without position_ids it counts padding too, which RoPE does not mind
    assert (got[1, 77:] - alone[0]).abs().max() <= 4 * tolerance(got)


def generate(
    model: PreTrainedModel, ids: Tensor, cache: tersekv.PackedCache | None = None, **options: object
) -> Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 20, "do_sample": False, **options}
    if cache is None:
        return model.generate(ids, **settings)
    with tersekv.attached(model):
        return model.generate(ids, past_key_values=cache, **settings)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_generate_greedy_sampled_and_beams(any_model: PreTrainedModel, ids: Tensor, options: dict[str, object]) -> None:
    cache = tersekv.cache(any_model, "none:dtype=fp32")
    assert torch.equal(generate(any_model, ids, cache, **options), generate(any_model, ids, **options))


def test_generate_with_left_padding(any_model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    options = {"attention_mask": mask}
    cache = tersekv.cache(any_model, "none:dtype=fp32")
    assert torch.equal(generate(any_model, ids, cache, **options), generate(any_model, ids, **options))


def test_greedy_tokens_are_the_same_on_both_routes(any_model: PreTrainedModel, ids: Tensor) -> None:
    texts = []  # a block becomes due after 24 of the new tokens
    for route in ("exact", "decoded"):
        with tersekv.attached(any_model, route):
            cache = tersekv.cache(any_model, "rotated:bits=3")
            texts.append(any_model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False))
    assert torch.equal(*texts)


def test_a_second_turn_continues_the_first(any_model: PreTrainedModel, ids: Tensor) -> None:
    cache = tersekv.cache(any_model, "none:dtype=fp32")
    first = generate(any_model, ids[:1], cache)
    second = torch.cat((first, torch.randint(1, 97, (1, 30))), 1)
    assert torch.equal(generate(any_model, second, cache), generate(any_model, second))


def test_crop_and_continue(llama: PreTrainedModel, ids: Tensor) -> None:
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "none:dtype=fp32")
        forward(llama, cache, ids)
        cache.crop(-20)
        cache.crop(torch.tensor(-100))  # as assisted decoding does it on a GPU
        assert cache.get_seq_length() == PROMPT - 120
        other = torch.cat((ids[:, : PROMPT - 120], torch.randint(1, 97, (2, 50))), 1)
        got = forward(llama, cache, other[:, -50:])
    expected = dense(llama, other)[:, -50:]
    assert (got - expected).abs().max() <= tolerance(expected)
    with pytest.raises(InputError, match="negative"):
        cache.crop(5)


def test_a_copy_goes_its_own_way(any_model: PreTrainedModel, ids: Tensor) -> None:
    more = ids[:, :9]
    with tersekv.attached(any_model):
        cache = tersekv.cache(any_model, "rotated:bits=3")
        forward(any_model, cache, ids)
        fork = cache.copy()
        first = forward(any_model, fork, more)
        forward(any_model, fork, ids[:, :80])
        assert torch.equal(forward(any_model, cache, more), first)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (PROMPT + 9, PROMPT + 89)


@pytest.mark.parametrize("spec", ["rotated:bits=3", "rotated:bits=3 policy=adaptive prefill=packed"])
def test_a_repeated_sequence_goes_on_as_the_one_did(any_model: PreTrainedModel, ids: Tensor, spec: str) -> None:
    with tersekv.attached(any_model):
        cache = tersekv.cache(any_model, spec)
        forward(any_model, cache, ids[:1])
        several = cache.copy()
        several.batch_repeat_interleave(2)
        alone = [forward(any_model, cache.copy(), ids[row : row + 1, :9]) for row in range(2)]
        together = forward(any_model, several, ids[:2, :9])
    assert (together - torch.cat(alone)).abs().max() <= tolerance(together)
    assert not torch.equal(*alone)


def test_report_with_no_sink(llama: PreTrainedModel, ids: Tensor) -> None:
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3 sink=0")
        forward(llama, cache, ids)
    report = cache.report()
    assert report.dense == 3 * 2 * 2 * 2 * PROMPT * 32 * 4 == 2 * report.dense16
    assert report.ratio == 2 * report.ratio16 > 2


def test_report_lists_every_layer_and_counts_every_byte(any_model: PreTrainedModel, ids: Tensor) -> None:
    with tersekv.attached(any_model):
        cache = tersekv.cache(any_model, "rotated:bits=3")
        assert cache.report().held == 0
        forward(any_model, cache, ids)
    report = cache.report()
    text = str(report)
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    windows = [layer.kind for layer in report.layers if "sliding window of 32" in layer.kind]
    assert len(windows) == (2 if any_model.config.model_type == "gemma3_text" else 0)
    assert ("sliding window" in text) == bool(windows)
    for layer in report.layers:
        if layer.tiers:
            assert layer.held == sum(sum(planes.values()) for planes in layer.tiers.values()) < layer.dense
            heads, d = any_model.config.num_key_value_heads, head_dim(any_model.config)
            assert layer.dense == 2 * 2 * heads * PROMPT * d * 4
    assert report.ratio == report.as_dict()["ratio"] > 1


def test_a_report_counts_what_waits_and_moves_nothing(llama: PreTrainedModel, ids: Tensor) -> None:
    cache = tersekv.cache(llama, "rotated:bits=4")
    with tersekv.attached(llama):
        forward(llama, cache, ids[:1])
        before = cache.report().held
        forward(llama, cache, ids[:1, :1])
    states = [layer.store.state for layer in cache.layers]
    report = cache.report()
    assert all(layer.store.state is state for layer, state in zip(cache.layers, states, strict=True))
    if native.missing() is None:
        tails = [tail for _, tail, _ in states if tail is not None]
        assert len(tails) == len(cache.layers)
        assert report.held - before == sum(x.nbytes for tail in tails for x in (tail.k, tail.v))


def test_gradients_are_refused_when_asked_for(ids: Tensor) -> None:
    llama = make_model("llama").train().requires_grad_(True)
    with torch.enable_grad(), tersekv.attached(llama):
        loss = llama(input_ids=ids, past_key_values=tersekv.cache(llama, "rotated:bits=4"), labels=ids).loss
        with torch.no_grad():
            same = llama(input_ids=ids, past_key_values=tersekv.cache(llama, "rotated:bits=4"), labels=ids).loss
    assert loss.detach() == same
    with pytest.raises(InputError, match="no gradient: what is stored is rounded"):
        loss.backward()


def test_attached_restores_the_model(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), tersekv.attached(llama):
        assert llama.config._attn_implementation == f"tersekv:{before}"
        raise RuntimeError("inside")
    assert llama.config._attn_implementation == before
    with pytest.raises(InputError, match='Did you mean "fused"'), tersekv.attached(llama, "fuse"):
        pass


def test_dense_cache_works_while_attached(any_model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    expected = dense(any_model, ids, mask)
    with tersekv.attached(any_model):
        got = dense(any_model, ids, mask)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1, 77:], expected[1, 77:])


def test_dense_layers_keep_the_models_own_attention() -> None:
    """Attention sinks of GPT-OSS: lost if dense layers went to SDPA, refused on packed ones."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {
        "num_hidden_layers": 2,
        "head_dim": 32,
        "sliding_window": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = GptOssForCausalLM(GptOssConfig(**SMALL, **sizes)).eval().requires_grad_(False)
    ids = torch.randint(1, 97, (1, 60))
    expected = dense(model, ids)
    with tersekv.attached(model):
        assert torch.equal(dense(model, ids), expected)
        with pytest.raises(InputError, match="s_aux, which packed attention does not compute"):
            forward(model, tersekv.cache(model, "rotated:bits=4"), ids)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attached_to_either_former_attention(ids: Tensor, implementation: str) -> None:
    model = make_model("gemma3")
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    expected = dense(model, ids, mask)
    with tersekv.attached(model):
        got = forward(model, tersekv.cache(model, "none:dtype=fp32"), ids, mask)
    assert (got[0] - expected[0]).abs().max() <= tolerance(expected)
    assert (got[1, 77:] - expected[1, 77:]).abs().max() <= tolerance(expected)


def test_crop_of_all_layers_or_none(ids: Tensor) -> None:
    """A full sliding window cannot be cropped; the packed layer before it must then not be either."""
    model = make_model("gemma3")
    with tersekv.attached(model):
        cache = tersekv.cache(model, "rotated:bits=3")
        forward(model, cache, ids)
        with pytest.raises(RuntimeError):
            cache.crop(-5)
    assert lengths(cache) == [PROMPT] * 3


def test_reset_makes_it_new(llama: PreTrainedModel, ids: Tensor) -> None:
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3")
        first = forward(llama, cache, ids)
        cache.reset()
        assert cache.report().held == 0
        assert torch.equal(forward(llama, cache, ids), first)


def test_slots_of_padded_chunks() -> None:
    from tersekv.hf.layer import Slots

    slots = Slots().grown(10, np.array([0, 4])).grown(5, np.array([0, 0])).grown(6, np.array([2, 0]))
    assert slots.real(21, 2).tolist() == [19, 17]
    assert slots.real(16, 2).tolist() == [15, 12]
    assert slots.cut(3).real(3, 2).tolist() == [3, 0]
    assert slots.select(np.array([1, 1, 0])).real(21, 3).tolist() == [17, 17, 19]
