"""Fitted codebooks: weighted k-means does what it says, a stopped run goes on, and files are for one model."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheFileError, InputError, SpecError
from tersekv.calibrate.kmeans import distortion, kmeans
from tersekv.calibrate.session import Settings
from tersekv.calibrate.vq import SCORE, FittedBooks, Shape, calibrate, fit_layer
from tersekv.calibrate.windows import Sample
from tersekv.codecs.books import Books
from tersekv.codecs.vq import VQ
from tersekv.errors import ModelError
from tersekv.hf.capture import Seen, observed
from tersekv.hf.cost import sequence_bytes
from tersekv.layout import BLOCK
from tersekv.models import load
from tersekv.ops import refusals
from tersekv.ops.anchors import causal_scores
from tersekv.ops.planes import read_codes
from tersekv.ops.rope import turned
from tersekv.prompt import prompt_ids
from tersekv.spec import parse
from tersekv.store import Store
from tersekv.terminal import Stages
from tersekv.testing import check_codec

SHAPE = Shape(dim=4, index=4, rounds=4)


def test_weights_move_entries_to_where_they_count() -> None:
    """Each of two k-means is the better one by its own measure, on points that it was not fitted to."""
    x, y = torch.randn(2, 3, 3000, 4).unbind(0)
    w, w_y = (3 * x[..., 0]).exp(), (3 * y[..., 0]).exp()
    even, weighted = (kmeans(x, some, 32, 20, 0) for some in (torch.ones_like(w), w))
    assert (distortion(y, w_y, weighted) < 0.8 * distortion(y, w_y, even)).all()
    assert (distortion(y, torch.ones_like(w), even) < 0.8 * distortion(y, torch.ones_like(w), weighted)).all()


def test_weights_count_as_copies_of_points() -> None:
    x = torch.randn(1, 400, 3)
    copies = torch.randint(1, 4, (400,))
    many = x[0].repeat_interleave(copies, 0)[None]
    table = torch.randn(1, 8, 3)
    one = distortion(x, copies[None].float(), table)
    assert torch.allclose(one, distortion(many, torch.ones(1, many.shape[1]), table), rtol=1e-5)


def test_every_entry_is_used_and_rounds_help() -> None:
    x = torch.cat((torch.randn(2, 500, 2), 40 + torch.randn(2, 20, 2)), 1)
    w = torch.ones(2, 520)
    found = [kmeans(x, w, 16, rounds, 0) for rounds in (1, 5, 30)]
    losses = [float(distortion(x, w, table).sum()) for table in found]
    assert losses == sorted(losses, reverse=True) and losses[2] < losses[0]
    assert (torch.cdist(found[2], x).amin(-1) < 1).all()


def run(calibration: Settings, folder: Path, out: Path, shape: Shape = SHAPE) -> FittedBooks:
    with Stages() as stages:
        return calibrate(calibration, shape, folder, out, stages)


def test_a_stopped_calibration_goes_on_and_gives_the_same(calibration: Settings, tmp_path: Path) -> None:
    done = run(calibration, tmp_path / "run", tmp_path / "one.safetensors")
    folder, samples = tmp_path / "run", (tmp_path / "run" / "samples.jsonl").read_bytes()
    lines = samples.splitlines(keepends=True)
    assert len(lines) == 5 + 3
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:40])
    times = {path: path.stat().st_mtime_ns for path in folder.glob("window*")}
    again = run(calibration, folder, tmp_path / "two.safetensors")
    assert (folder / "samples.jsonl").read_bytes() == samples and replace(again, path="", spec="") == replace(
        done, path="", spec=""
    )
    run(calibration, folder, tmp_path / "even.safetensors", replace(SHAPE, weights="none"))
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("window*")}, "windows are read once"
    one, two, even = (Books.load(tmp_path / f"{x}.safetensors").tensors for x in ("one", "two", "even"))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert not torch.equal(one["0.k.0"], even["0.k.0"])
    damaged = next(folder.glob("window*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CacheFileError, match="cannot be read"):
        run(calibration, folder, tmp_path / "three.safetensors")


@pytest.fixture
def books(calibration: Settings, tmp_path: Path) -> FittedBooks:
    return run(calibration, tmp_path / "run", tmp_path / "books.safetensors")


def test_books_say_where_they_come_from_and_work(books: FittedBooks, llama: PreTrainedModel, tmp_path: Path) -> None:
    about = Books.load(books.path).about
    assert {"model", "text", "seed", "versions", "commit", "windows", "fit", "lost", "fingerprint"} <= set(about)
    heads, layers, d, ids = 2, 3, 32, torch.randint(1, 97, (2, 300))
    assert books.nbytes == layers * 2 * heads * d * 16 * 2, "16 entries cost what 16 dense tokens do, in fp16"
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, f"{books.spec} recent=32")
        forward(llama, cache, ids, mask)
        planes = cache.report().planes()
        assert planes["codec", "k.fitted"] + planes["codec", "v.fitted"] == books.nbytes
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        assert torch.equal(forward(llama, cache, ids[:, :1], mask), forward(llama, again, ids[:, :1], mask))
    spec = parse(books.spec)
    grown = sequence_bytes(llama.config, spec, 300) - sequence_bytes(llama.config, parse("vq:dim=4"), 300)
    assert grown < books.nbytes


def test_fitted_books_pass_the_conformance_list(books: FittedBooks) -> None:
    spec = parse(books.spec)
    for side, codec in (("k", spec.k), ("v", spec.v)):
        check_codec(codec.at(2), side, (32,))


def test_each_layer_side_and_head_has_its_own_books(books: FittedBooks) -> None:
    codec = parse(books.spec).k.at(2)
    assert isinstance(codec, VQ) and (codec.layer, codec.side) == (2, "k")
    x = torch.randn(1, 2, 3, BLOCK, 32)
    packed = codec.encode(x)
    assert packed.layout.bits_per_value == packed.layout.nominal_bits == 1
    decoded, table = codec.decode(packed), Books.load(books.path).tensors["2.k.0"].float()
    for head in range(2):
        for place in range(8):
            part = x[0, head, :, :, 4 * place : 4 * place + 4]
            nearest = table[head, place][torch.cdist(part, table[head, place]).argmin(-1)]
            assert torch.equal(decoded[0, head, :, :, 4 * place : 4 * place + 4], nearest)


@pytest.fixture
def books_before(calibration: Settings, tmp_path: Path) -> FittedBooks:
    return run(calibration, tmp_path / "run", tmp_path / "before.safetensors", replace(SHAPE, rope="before"))


def test_keys_before_rope_are_entries_at_their_positions(books: FittedBooks, books_before: FittedBooks) -> None:
    """A key whose sub-vectors are entries of the books comes back, with the same codes wherever it was."""
    codec, after = parse(books_before.spec).k.at(1), parse(books.spec).k.at(1)
    assert isinstance(codec, VQ) and isinstance(after, VQ) and codec.tables.places == 8
    assert codec.layout(32).nbytes - after.layout(32).nbytes == 16, "a block's first position, aligned"
    index = torch.randint(16, (1, 2, 3, BLOCK, 8), dtype=torch.uint8)
    entries = codec.tables.values((index,))
    at = (starts := torch.tensor([4, 68, 5000]).expand(1, 2, 3))[..., None] + torch.arange(BLOCK)
    x = turned(entries, at, codec.frequencies, back=False)
    packed = codec.encode_at(x, starts)
    assert torch.equal(read_codes(packed).flatten(), index.flatten())
    assert torch.allclose(codec.decode(packed), x, atol=1e-5)
    tables = [Books.load(some.path).tensors for some in (books, books_before)]
    assert not torch.equal(tables[0]["1.k.0"], tables[1]["1.k.0"]) and torch.equal(*(x["1.v.0"] for x in tables))


def test_keys_before_rope_in_a_model(books_before: FittedBooks, llama: PreTrainedModel, tmp_path: Path) -> None:
    """A saved cache says the same, one in steps nearly; a cropped one goes on; frequencies are counted."""
    spec, ids = parse(f"{books_before.spec} recent=32"), torch.randint(1, 97, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    with tersekv.attached(llama):
        cache, steps = (tersekv.cache(llama, str(spec)) for _ in range(2))
        forward(llama, cache, ids, mask)
        for start, stop in pairwise((0, 90, 91, 230, 300)):
            forward(llama, steps, ids[:, start:stop], mask[:, :stop])
        assert cache.report().planes()["codec", "k.fitted"] == 3 * (2 * 8 * 16 * 4 * 2 + 16 * 8)
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        said = [forward(llama, some, ids[:, :1], mask) for some in (cache, again, steps)]
        assert torch.equal(said[0], said[1])
        assert (said[2] - said[0]).norm() < 0.2 * said[0].norm()
        cache.crop(-130)
        forward(llama, cache, ids[:, :5], torch.cat((mask[:, :171], torch.ones(2, 5, dtype=torch.int64)), 1))
    layout, recipe = spec.k.layout(32), spec.k.recipe(32)
    assert "vq, before RoPE" in refusals({"k": (layout, recipe)})


def test_chunks_of_keys_before_rope_give_the_same_bytes(books_before: FittedBooks) -> None:
    spec, x = parse(f"{books_before.spec} recent=0 sink=0").at(1), torch.randn(2, 1, 2, 300, 32)
    whole, parts = (Store(spec, 1, 2, 32, torch.float32, torch.device("cpu")) for _ in range(2))
    whole.append(*x, None)
    for some in x.split((1, 70, 5, 224), 3):
        parts.append(*some, None)
    assert torch.equal(whole.decoded().k, parts.decoded().k) and whole.decoded().k.shape[2] == 300
    assert (whole.decoded().k[:, :, :256] != x[0, :, :, :256]).all()


def test_a_ragged_batch_is_its_sequences_alone(books: FittedBooks) -> None:
    """Rows with fewer blocks leave gaps, in which no head may take another's books."""
    spec, x = parse(f"{books.spec} recent=0 sink=0").at(1), torch.randn(2, 2, 2, 300, 32)
    together, alone = (Store(spec, b, 2, 32, torch.float32, torch.device("cpu")) for b in (2, 1))
    together.append(*x, np.array([140, 0]))
    alone.append(*x[:, :1, :, 140:], None)
    mine, its = together.decoded(), alone.decoded()
    assert its.k.shape[2] == 160 and torch.equal(mine.k[:1, :, :160], its.k) and torch.equal(mine.v[:1, :, :160], its.v)


def test_what_books_refuse(
    books: FittedBooks, any_model: PreTrainedModel, llama: PreTrainedModel, tmp_path: Path
) -> None:
    if any_model.config.model_type != "llama":
        with pytest.raises(CacheFileError, match=r"fitted to another model \(tiny\)"):
            tersekv.cache(any_model, books.spec)
    with pytest.raises(SpecError, match="was made for index=4, not 6"):
        parse(books.spec.replace("index=4", "index=6"))
    with pytest.raises(SpecError, match="was made for rope=after, not before"):
        parse(books.spec.replace("index=4", "index=4,rope=before", 1))
    with pytest.raises(SpecError, match="rope=before needs books=FILE"):
        parse("vq:rope=before")
    with pytest.raises(SpecError, match=r"no table 7\.k"):
        parse(books.spec).k.at(7)
    with pytest.raises(SpecError, match="is for another"):
        parse(books.spec).k.layout(64)
    path = Path(books.path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheFileError, match="is damaged"):
        parse(books.spec)
    path.write_bytes(whole[:-7])
    with pytest.raises(CacheFileError, match="cannot be read"):
        parse(books.spec)
    path.unlink()
    with pytest.raises(CacheFileError, match="cannot be read"):
        parse(books.spec)


def test_a_cache_knows_its_books(
    calibration: Settings, books: FittedBooks, llama: PreTrainedModel, tmp_path: Path
) -> None:
    """A file that was fitted anew, under the same name, is not what the saved codes index."""
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, books.spec)
        forward(llama, cache, torch.randint(1, 97, (1, 200)))
    tersekv.save(cache, tmp_path / "cache.safetensors", llama)
    run(calibration, tmp_path / "run", Path(books.path), replace(SHAPE, weights="none"))
    with pytest.raises(CacheFileError, match="saved with other books"):
        tersekv.load(tmp_path / "cache.safetensors", llama)
    with tersekv.attached(llama):
        forward(llama, cache, torch.randint(1, 97, (1, 200)))  # one that lives goes on with those it has


def test_too_little_is_refused(calibration: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Allowed: a dim"):
        Shape(index=9)
    with pytest.raises(InputError, match="--dim 5 does not divide the head dim 32"):
        run(calibration, tmp_path / "run", tmp_path / "x", Shape(dim=5))


@pytest.mark.model
def test_weighted_books_lose_less_of_what_counts_on_real_keys_and_values() -> None:
    """Two layers of SmolLM2: each of both k-means wins by its own measure, on what it was fitted to.

    On other text that is a matter of measurement: `tersekv calibrate vq` prints it, the record shows what it is worth.
    """
    try:
        loaded = load("smollm2", "float32")
    except ModelError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    samples: list[dict[str, Tensor]] = []

    def look(seen: Seen) -> None:
        if seen.layer in (10, 20):
            for side, x in (("k", seen.k), ("v", seen.v)):
                weights = causal_scores(seen.q, seen.k, seen.v, seen.scale, SCORE[side])
                behind = torch.arange(x.shape[2], 0, -1)
                samples[-1] |= {f"{seen.layer}.{side}": x, f"{seen.layer}.{side}.weights": weights / behind}

    ids = prompt_ids(loaded.tokenizer, None)
    with observed(loaded.model, look):
        for start in range(0, 1500, 500):
            samples.append({})
            loaded.model(input_ids=ids[:, start : start + 500], use_cache=False, logits_to_keep=1)
    parts = [Sample({name: x[:, :, 4:436] for name, x in sample.items()}) for sample in samples]
    lost = {
        weights: [fit_layer(Shape(16, 6, weights=weights, rounds=8), layer, parts, parts, 0)[1] for layer in (10, 20)]
        for weights in ("anchors", "none")
    }
    for side in "kv":
        by = {
            kind: [sum(x[side][kind] for x in lost[w]) for w in ("anchors", "none")] for kind in ("alike", "weighted")
        }
        assert by["weighted"][0] < by["weighted"][1] and by["alike"][1] < by["alike"][0]
