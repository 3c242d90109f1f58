"""`generate` in CUDA graphs: when they are offered, on any machine; that they say what eager does, on a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, make_model
from stores import assert_same
from test_compile import measured
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import BaseStreamer

import tersekv
from tersekv import InputError
from tersekv.hf.graph import GraphedForward, refusal
from tersekv.ops import cuda

GRAPH = "in a CUDA graph"


class SaysCuda(LlamaForCausalLM):
    """On the processor, whatever it says."""

    device = property(lambda self: torch.device("cuda"))

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(device="cuda:0")])


@pytest.fixture
def claiming() -> PreTrainedModel:
    return SaysCuda(LlamaConfig(**SMALL, num_hidden_layers=2, head_dim=32)).eval()


def test_a_graph_is_the_compiled_call_of_a_packed_cache(claiming: PreTrainedModel) -> None:
    cache, settings = tersekv.cache(claiming, "rotated:bits=3"), GenerationConfig(max_length=77)
    names = set(vars(claiming))
    with tersekv.attached(claiming):
        assert claiming._valid_auto_compile_criteria({"past_key_values": cache}, settings)
        call = claiming.get_compiled_call(None)
        assert isinstance(call, GraphedForward) and (call.cache, call.length) == (cache, 77)
        assert not claiming._valid_auto_compile_criteria({"past_key_values": DynamicCache()}, settings)
        assert not isinstance(claiming.get_compiled_call(None), GraphedForward)
        settings.disable_compile = True
        assert not claiming._valid_auto_compile_criteria({"past_key_values": cache}, settings)
        assert "disable_compile" in cache.decoding and "disable_compile" in str(cache.report())
    assert set(vars(claiming)) - names <= {"_compiled_call", "_last_compile_config"}  # transformers' own


def test_refusals_name_the_reason(claiming: PreTrainedModel, llama: PreTrainedModel) -> None:
    cache = tersekv.cache(claiming, "rotated:bits=3")
    assert "not attached" in refusal(claiming, cache)
    with tersekv.attached(claiming, "exact"):
        assert "route=fused" in refusal(claiming, cache)
    with tersekv.attached(claiming):
        assert refusal(claiming, cache) == ""
        assert "DynamicSlidingWindowLayer" in refusal(claiming, tersekv.cache(make_model("gemma3"), "rotated:bits=3"))
    with tersekv.attached(llama):
        assert "on cpu" in refusal(llama, cache)


def test_a_pass_that_no_graph_can_hold_runs_as_usual(llama: PreTrainedModel, ids: Tensor) -> None:
    caches = [tersekv.cache(llama, "rotated:bits=3") for _ in range(2)]
    mask = torch.ones_like(ids)
    new = {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), ids.shape[1])}
    hidden = torch.cat((mask, torch.tensor([[1], [0]])), 1)
    with tersekv.attached(llama), torch.no_grad():
        calls = [llama, GraphedForward(llama, caches[1])]
        for given, said in (
            ({"input_ids": ids, "attention_mask": mask}, "one new token"),
            ({**new, "attention_mask": hidden}, "hides new tokens"),
            ({**new, "attention_mask": None, "odd": [1]}, "odd"),
        ):
            one, other = (
                call(**given, past_key_values=cache).logits for call, cache in zip(calls, caches, strict=True)
            )
            assert torch.equal(one, other) and said in caches[1].decoding
        with pytest.raises(InputError, match="mask shows"):
            calls[1](**new, past_key_values=caches[1], attention_mask=mask)
    assert caches[1].get_seq_length() == ids.shape[1] + 2


def tiny(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=3, head_dim=64, eos_token_id=None, **(sizes | options))
    return LlamaForCausalLM(config).eval().requires_grad_(False).to("cuda", torch.bfloat16)


def prompt(b: int, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (b, 200), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :77] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(
    model: PreTrainedModel, given: dict[str, Any], room: int | None = None, spec: str = "rotated:bits=4"
) -> tuple[list[Any], list[tersekv.PackedCache]]:
    """What `generate` returns, and its cache: eager, and as it is by itself."""
    said, caches = [], [tersekv.cache(model, spec, room) for _ in range(2)]
    for cache, eager in zip(caches, (True, False), strict=True):
        torch.manual_seed(5)
        with tersekv.attached(model):
            options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0, "disable_compile": eager, **given}
            said.append(model.generate(**options, past_key_values=cache))
    return said, caches


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
class TestOnAGpu:
    @pytest.mark.parametrize(("b", "padded"), [(1, False), (3, True)])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_new_tokens": 800},
            {"max_new_tokens": 3},
            {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
            {"prefill_chunk_size": 64},
        ],
    )
    def test_tokens_are_those_of_eager_decoding(self, b: int, padded: bool, options: dict[str, Any]) -> None:
        """With the same room, on which the order of sums depends; the longest texts grow out of it."""
        (eager, graphed), caches = both(tiny(), prompt(b, padded) | options, 400)
        assert torch.equal(eager, graphed)
        assert [cache.decoding == GRAPH for cache in caches] == [False, True]
        assert caches[0].get_seq_length() == caches[1].get_seq_length()

    def test_scores_and_states_are_not_overwritten(self) -> None:
        given = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        (eager, graphed), caches = both(tiny(), prompt(2, True) | given | {"output_hidden_states": True})
        assert caches[1].decoding == GRAPH
        for name in ("scores", "logits"):
            assert all(torch.equal(x, y) for x, y in zip(eager[name], graphed[name], strict=True))
        for one, other in zip(eager.hidden_states, graphed.hidden_states, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
        assert not torch.equal(graphed.logits[5], graphed.logits[6])

    def test_one_graph_serves_all_that_the_host_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captured, capture = [], GraphedForward._captured
        monkeypatch.setattr(GraphedForward, "_captured", lambda *x: captured.append(1) or capture(*x))
        both(tiny(), prompt(1) | {"max_new_tokens": 600})
        assert len(captured) == 1
        both(tiny(), prompt(1) | {"max_new_tokens": 600}, room=300)
        assert len(captured) > 2

    @pytest.mark.parametrize(("b", "padded"), [(1, False), (3, True)])
    @pytest.mark.parametrize("first", [6, 150])
    def test_presets_decode_in_one_graph_while_queries_are_summed(
        self, first: int, b: int, padded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the sixth token to beyond the 512th, blocks being packed meanwhile."""
        captured, capture = [], GraphedForward._captured
        monkeypatch.setattr(GraphedForward, "_captured", lambda *x: captured.append(1) or capture(*x))
        given = {name: x[:, -first:] for name, x in prompt(b, padded).items()}
        (eager, graphed), caches = both(tiny(), given | {"max_new_tokens": 700}, 1000, "terse4")
        assert torch.equal(eager, graphed) and caches[1].decoding == GRAPH and len(captured) == 1
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            assert_same(one.opened().tiers, other.opened().tiers)

    def test_several_turns(self) -> None:
        model, turns = tiny(), [torch.randint(1, 97, (1, n), device="cuda") for n in (200, 30, 5, 1)]
        caches = [tersekv.cache(model, "rotated:bits=3") for _ in range(2)]
        for number, new in enumerate(turns):
            texts = new if number == 0 else torch.cat((said[0], new), 1)
            with tersekv.attached(model):
                said = [
                    model.generate(texts, past_key_values=c, max_new_tokens=90, do_sample=False, disable_compile=eager)
                    for c, eager in zip(caches, (True, False), strict=True)
                ]
            assert torch.equal(*said) and caches[1].decoding == GRAPH
            if number == 1:
                caches = [cache.copy() for cache in caches]

    def test_streamers_and_stopping_criteria(self) -> None:
        heard = [Heard(), Heard()]

        def enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] > 270, device=ids.device)

        model, given = tiny(), prompt(1)
        for streamer, eager in zip(heard, (True, False), strict=True):
            with tersekv.attached(model):
                cache, more = tersekv.cache(model), {"streamer": streamer, "stopping_criteria": [enough]}
                model.generate(**given, **more, past_key_values=cache, max_new_tokens=99, disable_compile=eager)
        assert heard[0].tokens == heard[1].tokens and len(heard[0].tokens) == 272

    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["beams", "prompt lookup"]
    )
    def test_what_transformers_never_compiles_is_eager(self, options: dict[str, Any]) -> None:
        (eager, same), caches = both(tiny(), prompt(1) | options | {"max_new_tokens": 40})
        assert torch.equal(eager, same) and GRAPH not in caches[1].decoding

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("rotated:bits=4 policy=streaming keep=128", "policy"),
            ("rotated:bits=8", "do not read its pages"),
            ("rotated:bits=4 sink=300", "still to come"),
        ],
    )
    def test_what_has_no_such_steps_is_eager_and_says_why(self, spec: str, said: str) -> None:
        (eager, same), caches = both(tiny(), prompt(1) | {"max_new_tokens": 20}, spec=spec)
        assert torch.equal(eager, same) and said in caches[1].decoding and "eager" in str(caches[1].report())

    def test_a_model_that_cannot_be_captured(self) -> None:
        model = tiny()

        def look(module: Any, given: Any, out: Tensor) -> None:
            assert bool(torch.isfinite(out).all())  # waits for the device

        looks = model.model.layers[1].mlp.register_forward_hook(look)
        (eager, same), caches = both(model, prompt(2))
        assert torch.equal(eager, same) and "waits for the device, in" in caches[1].decoding
        assert Path(__file__).name in caches[1].decoding
        looks.remove()
        assert both(model, prompt(2))[1][1].decoding == GRAPH

    def test_the_context_ends_where_it_does_in_eager_decoding(self) -> None:
        model = tiny(max_position_embeddings=230)
        for eager in (True, False):
            cache = tersekv.cache(model, "rotated:bits=4")
            with tersekv.attached(model), pytest.raises(InputError, match="context of 230"):
                model.generate(**prompt(1), past_key_values=cache, max_new_tokens=50, disable_compile=eager)
            assert cache.get_seq_length() == 230

    def test_a_compiled_forward_pass(self) -> None:
        """Without a graph of ours, in one, and with those of torch."""
        found = measured("on_gpu")
        assert found["same"] == [True] * 4 and found["decoding"][2] == GRAPH
