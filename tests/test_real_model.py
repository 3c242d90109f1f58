"""Real models. SmolLM2 always (downloaded once); the others with `-m slow`."""

import pytest
import torch

import tersekv
from tersekv.errors import ModelError
from tersekv.eval.logits import arms, compare
from tersekv.models import LoadedModel, load
from tersekv.prompt import prompt_ids

MODELS = [
    pytest.param("smollm2", marks=pytest.mark.model),
    pytest.param("gemma3-270m", marks=[pytest.mark.model, pytest.mark.slow]),
    pytest.param("qwen2.5-coder-1.5b", marks=[pytest.mark.model, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=MODELS)
def real(request: pytest.FixtureRequest) -> LoadedModel:
    try:
        return load(request.param, "float32")
    except ModelError as error:
        pytest.skip(f"{request.param} cannot be had here: {error}")


def test_all_routes_give_the_same_greedy_tokens(real: LoadedModel) -> None:
    ids = prompt_ids(real.tokenizer, None)[:, :420]
    tokens, logits = [], []
    for route in ("exact", "decoded", "fused"):
        cache = tersekv.cache(real.model, "rotated:bits=4")
        with torch.inference_mode(), tersekv.attached(real.model, route):
            out = real.model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=40,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens.append(out.sequences)
        logits.append(torch.cat(out.logits))
    assert torch.equal(tokens[0], tokens[1])
    # The prompt is of these pages, so that an edit of them may lead to a near tie: until then both say the same.
    changed = (tokens[2] != tokens[1])[0, ids.shape[1] :].nonzero()[:, 0].tolist()
    same = min(changed, default=len(logits[1]) - 1)
    deviation = logits[1][: same + 1].std()
    assert (logits[2] - logits[1])[: same + 1].abs().max() < 0.1 * deviation, "of 8-bit integers in attention"
    if changed:
        lead = logits[1][same].max() - logits[1][same, tokens[2][0, ids.shape[1] + same]]
        assert lead < 0.01 * deviation, f"8-bit integers in attention changed token {same}, which was {lead:.3f} ahead"
    # fp32 roundings grow through the layers; some thousand of the largest logit is their size after thirty.
    bound = 5000 * torch.finfo(torch.float32).eps * logits[0].abs().max()
    assert (logits[0] - logits[1]).abs().max() <= bound


def test_more_bits_are_nearer_and_the_block_mean_helps(real: LoadedModel) -> None:
    """The order of the recipes on real keys and values, from real pages, as decoding sees them."""
    specs = ["rotated:bits=4", "rotated:bits=2", "rotated:bits=2,mean=none", "lloydmax:bits=2"]
    chosen = arms(real.model, [tersekv.parse(f"{spec} prefill=packed") for spec in specs])
    compare(real.model, prompt_ids(real.tokenizer, None)[:, :700], chosen, 350, 128)
    kl = [arm.divergence.summary()["kl_mean"] for arm in chosen]
    assert kl[0] == 0 < kl[1] < kl[2] < kl[3] < kl[4]
    assert kl[1] < 0.03
