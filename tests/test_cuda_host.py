"""Dense tiers, merging, and the whole store on a GPU: the kernels are what runs. `pytest -m gpu` on a GPU machine."""

import numpy as np
import pytest
import torch
from native_cases import make_case, mma_pages
from test_cuda_step import tiny

import tersekv
from tersekv import ops
from tersekv.bench import gpu
from tersekv.ops import attention as reference
from tersekv.ops import cuda
from tersekv.spec import parse
from tersekv.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]


@pytest.fixture
def reference_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the reference ran where the CUDA kernels should have")

    for name in ("attend_pages", "attend_dense", "attend_causal", "merge"):
        monkeypatch.setattr(ops.reference, name, refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "g", "n", "t"), [(64, 3, 1, 5), (128, 4, 1, 131), (128, 1, 9, 300), (256, 4, 4, 64)])
def test_dense_attention_and_merge(d: int, g: int, n: int, t: int, dtype: torch.dtype) -> None:
    q, scale = torch.randn(2, 2 * g, n, d), d**-0.5
    fused = torch.randn(2, t, 2, 3 * d).to(dtype)  # tokens before heads, inside of a wider row
    k, v = (fused[..., i * d : (i + 1) * d].transpose(1, 2) for i in (0, 1))
    lengths = torch.tensor([[t, max(t - 3, 1)], [1, 0]])
    k[1, 1], v[1, 0, 1:] = torch.nan, torch.nan
    padding = torch.tensor([0, 2])
    cases = [
        (ops.attend_dense, reference.attend_dense, lengths, k, v),
        (ops.attend_causal, reference.attend_causal, padding, k[:, :, -n:].nan_to_num(), v[:, :, -n:].nan_to_num()),
    ]
    parts = []
    for fast, slow, counts, keys, values in cases:
        if n > values.shape[2]:
            continue
        torch.full((2**24,), torch.nan, device="cuda")
        got = fast(q.cuda(), keys.cuda(), values.cuda(), counts, scale)
        want = slow(q, keys, values, counts, scale)
        assert torch.allclose(got[0].cpu(), want[0], atol=2e-5) and torch.allclose(got[1].cpu(), want[1], atol=2e-5)
        parts.append((got, want))
    whole, right = ops.merge([got for got, _ in parts]), reference.merge([want for _, want in parts])
    assert torch.allclose(whole[0].cpu(), right[0], atol=2e-5) and torch.allclose(whole[1].cpu(), right[1], atol=2e-5)


@pytest.mark.parametrize("count", [2, 8, 9, 20])
def test_any_number_of_parts(count: int, request: pytest.FixtureRequest) -> None:
    parts = [(torch.randn(2, 3, 4, 128), torch.randn(2, 3, 4)) for _ in range(count)]
    parts[1][1][0] = -torch.inf
    want = reference.merge(parts)
    request.getfixturevalue("reference_raises")
    got = ops.merge([(out.cuda(), lse.cuda()) for out, lse in parts])
    assert all(torch.allclose(a.cpu(), b, atol=1e-5) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("reference_raises")
def test_ops_run_the_kernels() -> None:
    case = make_case("3 normal scale:log8 channel_zero:int8", "3 normal scale:log8", 64, 2, 1, [[130, 1]])
    pages = mma_pages(case, "cuda")
    whole = ops.attend_pages(case.q.cuda(), pages, case.scale)
    assert torch.equal(whole[0], cuda.attend_pages(case.q.cuda(), pages, case.scale)[0])
    assert ops.implementation_of(pages) == "CUDA"


@pytest.mark.parametrize(
    "spec",
    [
        "rotated:bits=4",
        "rotated:bits=2",
        "intn:bits=4",
        "k=intn:bits=2,axis=channel v=lloydmax:bits=3",
        "k=rotated:bits=2 v=trellis:bits=1",
    ],
)
def test_a_store_decodes_with_the_kernels(
    spec: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, none = parse(spec), np.zeros(2, dtype=np.int64)
    stores = [Store(parsed, 2, 2, 128, torch.bfloat16, torch.device("cuda")) for _ in range(2)]
    steps = [torch.randn(3, 2, 2, n, 128, dtype=torch.bfloat16, device="cuda") for n in (300, *[1] * 70)]
    decoded = []
    for route, store in zip(("decoded", "fused"), stores, strict=True):
        outputs = [store.extend(*steps[0], none, 0.09, route)]
        if route == "fused":
            request.getfixturevalue("reference_raises")
            for codec in (parsed.k, parsed.v):
                monkeypatch.setattr(type(codec), "encode", None)
        decoded.append([*outputs, *(store.extend(*step, none, 0.09, route) for step in steps[1:])])
    for slow, fast in zip(*decoded, strict=True):
        assert (slow.float() - fast.float()).norm() <= 0.03 * slow.float().norm()


@pytest.mark.parametrize("spec", ["none", "k=none v=rotated:bits=3", "k=rotated:bits=4 v=none"])
def test_a_model_decodes_over_bf16_pages_with_the_kernels(spec: str, request: pytest.FixtureRequest) -> None:
    """A turn of 16 tokens, then one by one: as attention to the decoded tokens has it."""
    model, ids, said = tiny(), torch.randint(1, 97, (2, 300), device="cuda"), []
    for route in ("decoded", "fused"):
        with tersekv.attached(model, route), torch.inference_mode():
            cache = tersekv.cache(model, spec)
            model(ids[:, :200], past_key_values=cache)
            if route == "fused":
                request.getfixturevalue("reference_raises")
            turns = ids[:, 200:].split([16, *[1] * 84], dim=1)
            said.append(torch.stack([model(turn, past_key_values=cache).logits[:, -1].float() for turn in turns]))
    assert cache.report().implementation == "CUDA"
    assert (said[0] - said[1]).norm() <= 0.03 * said[0].norm()


def test_what_kernels_refuse_runs_on_the_reference() -> None:
    refused = (
        ("rotated:bits=8", 256, "8 bits of unequal steps"),
        ("intn:bits=5", 64, "5 bits"),
        ("none", 256, "stored in bf16 at head dim 256"),
        ("none:dtype=fp16", 64, "stored in fp16"),
        ("trellis:bits=2", 128, "keys: recipe trellis"),
        ("k=rotated:bits=2 v=trellis:bits=2,mean=block", 128, "plane channel_zero"),
    )
    for spec, d, said in refused:
        store = Store(parse(spec), 1, 1, d, torch.float32, torch.device("cuda"))
        for n in (200, 1):
            store.extend(*torch.randn(3, 1, 1, n, d, device="cuda"), np.zeros(1, dtype=np.int64), 0.125)
        assert said in ops.implementation_of(store.tiers.packed["packed"].pages)


def test_a_decoding_step_is_captured_in_a_graph() -> None:
    case = make_case("4 normal scale:log8 channel_zero:int8", "2 normal scale:log8", 128, 4, 1, [[4000, 1000]])
    pages, q = mma_pages(case, "cuda"), case.q.cuda()
    right = ops.attend_pages(q, pages, case.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.attend_pages(q, pages, case.scale)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, right[0]) and torch.equal(lse, right[1])


@pytest.mark.parametrize(
    "spec",
    [
        *("rotated:bits=4", "rotated:bits=3", "rotated:bits=1", "intn:bits=4", "intn:bits=8", "lloydmax:bits=2"),
        *(f"k=rotated:bits=2 v=trellis:bits={bits}" for bits in (1, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize(("d", "t"), [(64, 1024), (128, 4096)])
def test_errors_of_many_blocks_at_once(spec: str, d: int, t: int) -> None:
    """At most twice those of bf16 attention on the same tensors, and the same at each run on a full GPU."""
    case = gpu.Case(64, d, 32, 8, t)
    one, _ = gpu.ours(case, spec, parse(spec), gpu.draw(case, "cuda"))
    outs = [one.run()[0] for _ in range(6)]
    assert all(torch.equal(out, outs[0]) for out in outs)
