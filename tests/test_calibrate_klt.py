"""Fitted transforms: errors go where queries do not look, a stopped run goes on, and files are for one model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheFileError, InputError, SpecError
from tersekv.calibrate.klt import FittedTransform, calibrate, fitted
from tersekv.calibrate.session import Settings
from tersekv.codec import Codec
from tersekv.codecs.books import Books
from tersekv.codecs.klt import KLT, allocated
from tersekv.codecs.rotated import Rotated
from tersekv.layout import BLOCK
from tersekv.ops import refusals
from tersekv.spec import parse, parse_codec
from tersekv.terminal import Stages
from tersekv.testing import check_codec

D = 64


def run(calibration: Settings, folder: Path, out: Path, groups: int = 8, weights: str = "fisher") -> FittedTransform:
    with Stages() as stages:
        return calibrate(calibration, groups, weights, folder, out, stages)


@pytest.fixture
def books(calibration: Settings, tmp_path: Path) -> FittedTransform:
    return run(calibration, tmp_path / "run", tmp_path / "klt.safetensors")


def skewed(seed: int) -> tuple[Tensor, Tensor]:
    """Keys (h, n, d) and queries (h, m, d) of which each has a few strong directions of its own."""
    torch.manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(4, 2, D, D, generator=torch.Generator().manual_seed(1)))[0]
    strength = torch.logspace(0, -2, D)
    k = torch.randn(2, 40 * BLOCK, D) * strength @ directions[0]
    return k, torch.randn(2, 32 * BLOCK, D) * strength @ directions[1]


def made(path: Path, bits: int, groups: int) -> KLT:
    """The codec of keys of a file for two heads of such keys and queries."""
    k, q = (x.double() for x in skewed(2))
    matrix, costs = fitted(k.mT @ k / k.shape[1], q.mT @ q, groups)
    about = {"calibrate": "klt", "codecs": {"k": {"groups": groups}}, "fingerprint": "", "model": {"name": "none"}}
    Books("", about, {"0.k.forward": matrix, "0.k.costs": costs}).save(path)
    codec = parse_codec(f"klt:bits={bits},groups={groups},books={path}", "k")
    assert isinstance(codec, KLT)
    return codec


def logit_error(codec: Codec) -> float:
    k, q = skewed(3)
    x = k.unflatten(1, (-1, BLOCK))[None]
    e = (codec.decode(codec.encode(x)) - x)[0].flatten(1, 2)
    return float((q @ e.mT).square().mean())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_queries_see_less_of_the_errors(bits: int, tmp_path: Path) -> None:
    """Other keys and queries than it was fitted to, of the same covariances; the bytes are those of `rotated` or fewer
    than one bit in a hundred more.
    """
    plain = Rotated(bits, mean="block")
    one, eight = (made(tmp_path / f"{n}.x", bits, n) for n in (1, 8))
    assert one.layout(D).nbytes == plain.layout(D).nbytes and eight.layout(D).nominal_bits == bits
    assert eight.layout(D).nbytes <= 1.01 * plain.layout(D).nbytes
    errors = [logit_error(codec) for codec in (plain, one, eight)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


def test_equal_channels_leave_nothing_to_gain(tmp_path: Path) -> None:
    eye = torch.eye(D, dtype=torch.float64).expand(2, D, D)
    _, costs = fitted(eye, eye, 8)
    assert allocated(costs.sum(0).tolist(), 2) == (2,) * 8
    assert allocated([100.0, 1.0, 1.0, 1e-4], 2) == (5, 2, 1, 0)


def test_groups_of_one_width_are_read_by_kernels(tmp_path: Path) -> None:
    one, eight = (made(tmp_path / f"{n}.x", 3, n) for n in (1, 8))
    reason = {codec: refusals({"k": (codec.layout(D), codec.recipe(D))}) for codec in (one, eight)}
    assert reason[one] == refusals({"k": (Rotated(3, mean="block").layout(D), Rotated(3).recipe(D))})
    assert "grid of several widths" in reason[eight]


@pytest.mark.parametrize("groups", [1, 8])
def test_fitted_transforms_pass_the_conformance_list(groups: int, tmp_path: Path) -> None:
    check_codec(made(tmp_path / "x", 2, groups), "k", (D,))


@pytest.mark.parametrize("scale", ["unbiased", "norm"])
@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (1, 4), (3, 4)])
def test_attention_in_the_folded_domain(bits: int, groups: int, scale: str, tmp_path: Path) -> None:
    """Two query heads to a KV head; blocks alone are blocks together; nothing comes of nothing."""
    codec = replace(made(tmp_path / "x", bits, groups), scale=scale)
    x, q = (some[None].unflatten(2, (-1, BLOCK)) for some in skewed(4))
    packed = codec.encode(x)
    assert torch.equal(codec.encode(x[:, :, 3:5]).data, packed.data[:, :, 3:5])
    decoded, q = codec.decode(packed).flatten(2, 3), q.flatten(2, 3).unflatten(2, (2, -1)).flatten(1, 2)
    folded, keys = codec.recipe(D).values(packed).flatten(2, 3), decoded.repeat_interleave(2, 1)
    scores = codec.fold_query(q) @ folded.repeat_interleave(2, 1).mT
    assert torch.allclose(scores, q @ keys.mT, rtol=1e-4, atol=1e-4 * scores.abs().max().item())
    out = codec.unfold_output(scores.softmax(-1) @ folded.repeat_interleave(2, 1))
    assert torch.allclose(out, scores.softmax(-1) @ keys, rtol=1e-3, atol=1e-4 * keys.abs().max().item())
    assert not codec.decode(codec.encode(torch.zeros_like(x))).any()
    low = x.to(torch.bfloat16)
    assert torch.equal(codec.encode(low).data, codec.encode(low.float()).data)


def test_without_a_file_it_is_the_plain_rotation() -> None:
    x = torch.randn(2, 2, 3, BLOCK, D)
    for side, mean in (("k", "block"), ("v", "none")):
        mine, plain = getattr(parse("klt:bits=3"), side), Rotated(3, mean=mean)
        assert torch.equal(mine.encode(x).data, plain.encode(x).data)
    with pytest.raises(SpecError, match="groups=8 needs books=FILE"):
        parse("klt:groups=8")


def test_a_stopped_calibration_goes_on_and_gives_the_same(calibration: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(calibration, folder, tmp_path / "one.x")
    samples = (folder / "samples.jsonl").read_bytes()
    lines = samples.splitlines(keepends=True)
    assert len(lines) == 5
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:30])
    again = run(calibration, folder, tmp_path / "two.x")
    assert (folder / "samples.jsonl").read_bytes() == samples and again.error == done.error
    run(calibration, folder, tmp_path / "three.x", weights="queries")
    one, two, three = (Books.load(tmp_path / f"{name}.x").tensors for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.k.forward"], three["0.k.forward"])


def test_a_transform_says_where_it_comes_from_and_works(
    books: FittedTransform, llama: PreTrainedModel, tmp_path: Path
) -> None:
    about = Books.load(books.path).about
    assert {"model", "text", "seed", "versions", "commit", "windows", "seconds", "fingerprint"} <= set(about)
    ids = torch.randint(1, 97, (2, 300))
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, f"{books.spec} recent=32")
        exact = tersekv.cache(llama, "none recent=32")
        near = [forward(llama, some, ids) for some in (cache, exact)]
        assert (near[0] - near[1]).norm() < 0.2 * near[1].norm()
        planes = cache.report().planes()
        matrices = 3 * 2 * 2 * (32 * 32 * (2 + 4) + 8 * 4)
        assert planes["codec", "k.fitted"] + planes["codec", "v.fitted"] == matrices, "fp16, and fp32 inverses"
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        assert torch.equal(forward(llama, cache, ids[:, :1]), forward(llama, again, ids[:, :1]))


def test_what_transforms_refuse(
    calibration: Settings, books: FittedTransform, any_model: PreTrainedModel, tmp_path: Path
) -> None:
    if any_model.config.model_type != "llama":
        with pytest.raises(CacheFileError, match=r"fitted to another model \(tiny\)"):
            tersekv.cache(any_model, books.spec)
    with pytest.raises(SpecError, match="was made for groups=8, not 4"):
        parse(books.spec.replace("groups=8", "groups=4"))
    with pytest.raises(SpecError, match=r"no table 7\.k"):
        parse(books.spec).k.at(7)
    with pytest.raises(SpecError, match=r"head_dim 64: .* is for 32"):
        parse(books.spec).k.layout(64)
    with pytest.raises(SpecError, match="made by tersekv calibrate klt, not vq"):
        parse(f"vq:mean=none,scale=none,books={books.path}")
    with pytest.raises(InputError, match="--groups 5 does not divide the head dim 32"):
        run(calibration, tmp_path / "run", tmp_path / "x", groups=5)


def test_a_file_made_anew_is_another_codec(calibration: Settings, books: FittedTransform, tmp_path: Path) -> None:
    before = parse(books.spec).k
    run(calibration, tmp_path / "run", Path(books.path), weights="queries")
    after = parse(books.spec).k
    assert isinstance(before, KLT) and before != after
