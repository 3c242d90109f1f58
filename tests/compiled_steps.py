"""What `test_compile.py` asserts, measured in a process without the shape checker, which no compiler can read.

python tests/compiled_steps.py CASE      prints one JSON object
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tersekv

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 160,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=32, layer_types=KINDS)),
}


def made(name: str) -> tuple[PreTrainedModel, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    return model, torch.randint(1, 97, (2, 90))


def cache_of(model: PreTrainedModel) -> tersekv.PackedCache:
    return tersekv.cache(model, "rotated:bits=3 recent=16")


def steps(model: Callable[..., Any], cache: tersekv.PackedCache, ids: Tensor, count: int) -> Tensor:
    """Logits after a left-padded prompt, and after each token that is chosen from them."""
    mask = torch.ones_like(ids)
    mask[1, :33] = 0
    said = [model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]]
    for _ in range(count):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        out = model(input_ids=said[-1].argmax(-1), attention_mask=mask, past_key_values=cache)
        said.append(out.logits[:, -1:])
    return torch.cat(said, 1)


def logits(name: str) -> dict[str, Any]:
    """Of one cache and then another: no graph is made that the first few steps had not."""
    model, ids = made(name)
    with tersekv.attached(model), torch.inference_mode():
        watching = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # so no decoder layer is native
        eager = steps(model, cache_of(model), ids, 40)
        watching.remove()
        traced = torch.compile(model, backend="aot_eager", fullgraph=name != "gemma3")
        steps(traced, cache_of(model), ids, 3)
        graphs = counters["stats"]["unique_graphs"]
        said = steps(traced, cache_of(model), ids, 40)
    breaks = [reason.partition("\n")[0] for reason in counters["graph_break"]]
    later = counters["stats"]["unique_graphs"] - graphs
    return {"error": (said - eager).abs().max().item(), "graphs": graphs, "later": later, "breaks": breaks}


def generate() -> dict[str, Any]:
    """By inductor, with `model.forward` compiled, greedy and sampled."""
    model, ids = made("llama")
    said = []
    for forward in (model.forward, torch.compile(model.forward)):
        model.forward = forward
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            torch.manual_seed(1)
            with tersekv.attached(model):
                cache = cache_of(model)
                said.append(model.generate(ids, past_key_values=cache, max_new_tokens=30, **options).tolist())
                said[-1].append(cache.get_seq_length())
    return {"greedy": said[0] == said[2], "sampled": said[1] == said[3], "differ": said[0] != said[1]}


def effects() -> dict[str, Any]:
    """A pass whose output nobody uses stores its tokens all the same; a second one in the same graph is refused."""
    model, ids = made("llama")

    def unused(cache: tersekv.PackedCache) -> Tensor:
        model(input_ids=ids[:, :50], past_key_values=cache, logits_to_keep=1)
        return ids + 1

    def twice(cache: tersekv.PackedCache) -> Tensor:
        model(input_ids=ids[:, :50], past_key_values=cache)
        return model(input_ids=ids[:, 50:], past_key_values=cache).logits

    with tersekv.attached(model), torch.inference_mode():
        caches = [cache_of(model) for _ in range(2)]
        torch.compile(unused, backend="aot_eager", fullgraph=True)(caches[0])
        try:
            torch.compile(twice, backend="aot_eager", fullgraph=True)(caches[1])
        except tersekv.CacheError as error:
            return {"tokens": [x.get_seq_length() for x in caches], "found": str(error)}
    return {}


def errors() -> dict[str, Any]:
    """They are those of eager decoding, and the cache is unchanged."""
    model, ids = made("llama")
    traced, found = torch.compile(model, backend="aot_eager"), []
    with tersekv.attached(model), torch.inference_mode():
        cache = cache_of(model)
        traced(input_ids=ids, past_key_values=cache)
        for given in ({"input_ids": ids}, {"input_ids": ids[:1, :3]}, {"input_ids": ids[:, :3], "attention_mask": ids}):
            try:
                traced(**given, past_key_values=cache)
            except tersekv.InputError as error:
                found.append(str(error))
        copies = [cache.copy() for _ in range(2)]
        said = [f(input_ids=ids[:, :5], past_key_values=c).logits for f, c in zip((model, traced), copies, strict=True)]
    return {
        "found": found,
        "tokens": cache.get_seq_length(),
        "error": (said[0] - said[1]).abs().max().item(),
    }


def gradients() -> dict[str, Any]:
    model, ids = made("llama")
    traced = torch.compile(model, backend="aot_eager")
    with tersekv.attached(model):
        said = [f(input_ids=ids, past_key_values=cache_of(model)).logits for f in (model, traced)]
        try:
            said[1].sum().backward()
        except tersekv.InputError as error:
            return {"error": (said[0] - said[1]).abs().max().item(), "found": str(error)}
    return {}


def on_gpu() -> dict[str, Any]:
    """Of compiled models, decoding without a graph of ours and in one."""
    model, ids = made("llama")
    model.requires_grad_(False).to("cuda")
    plain, said, decoding = model.forward, [], []
    for forward, eager in (
        (plain, True),
        (torch.compile(plain), True),
        (torch.compile(plain), False),
        (torch.compile(plain, mode="reduce-overhead"), True),
    ):
        model.forward = forward
        cache = cache_of(model)
        with tersekv.attached(model):
            options = {"max_new_tokens": 66, "do_sample": False, "disable_compile": eager}
            said.append(model.generate(ids.to("cuda"), past_key_values=cache, **options).tolist())
        decoding.append(cache.decoding)
    return {"same": [x == said[0] for x in said], "decoding": decoding}


if __name__ == "__main__":
    case, *arguments = sys.argv[1].split(":")
    print(json.dumps(globals()[case](*arguments)))
