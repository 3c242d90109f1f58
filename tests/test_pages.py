"""README and docs: blocks and pictures are fresh, links lead somewhere, and the code in them runs."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tersekv import InputError, parse
from tersekv.eval.runfile import read_run
from tersekv.pages import FIGURES, ROOT, outdated, update
from tersekv.reports.captions import caption
from tersekv.reports.figures import family_and_label, is_fresh
from tersekv.reports.models import by_bits
from tersekv.reports.replications import PUBLISHED
from tersekv.spec import codecs

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def fenced(page: str, language: str) -> list[str]:
    """The code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def reader(llama: LlamaForCausalLM) -> dict[str, Any]:
    """The names that a reader of the README has: a model, its tokenizer and a text."""
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_input_names=names)
    return {"model": llama, "tokenizer": tokenizer, "text": "hello world " * 100}


@pytest.fixture
def record() -> dict[str, Any]:
    """A record as `tersekv eval` writes it, with invented numbers."""
    rows = []
    for spec, held, kl in (("dense", 1000, 0.0), ("rotated:bits=3", 230, 0.013)):
        sizes = {"held": held, "dense": 1000, "dense16": 1000, "ratio": 1000 / held, "ratio16": 1000 / held}
        quality = {"kl_mean": kl, "kl_p99": 9 * kl, "kl_max": 20 * kl, "top1": 1 - kl, "perplexity": 20.0}
        quality |= {"kl_mean_interval": [kl * 0.9, kl * 1.1], "loss_difference": kl, "loss_difference_interval": None}
        logits = {"windows": 2, "positions": 3967, "seconds": 1.0} | sizes | quality
        rows.append({"spec": spec, "nominal_bits": 3.0, "body_bits": 3.2, "logits": {"4096": logits}})
    run = {"model": "tiny", "specs": [], "seed": 0, "dtype": "bfloat16", "logits": {"windows": [4096]}}
    made = {"commit": "0" * 40, "versions": {"torch": "2.13.0"}, "device": "x86_64", "date": "2025-01-01"}
    made |= {"data": {"text": {"name": "wiki.test.raw", "sha256": "0" * 64}}, "implementation": "reference"}
    return {"run": run, "model": {"source": "random"}, "rows": rows} | made


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The pages and what others published, without the records."""
    for page in [*PAGES, ROOT / PUBLISHED]:
        target = tmp_path / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    return tmp_path


def test_blocks_and_pictures_are_fresh() -> None:
    assert [str(path) for path in outdated()] == [], "run `tersekv report`"


def test_a_stale_block_is_noticed_and_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update(check=False, root=copied)
    assert update(check=True, root=copied) == 0
    page = copied / "docs" / "codecs.md"
    fresh = page.read_text()
    page.write_text(fresh.replace("| rotated:bits=3 | 3.281", "| rotated:bits=3 | 2.281"))
    assert page.read_text() != fresh
    assert update(check=True, root=copied) == 1
    assert f"stale: {page}" in capsys.readouterr().out
    assert update(check=False, root=copied) == 0
    assert page.read_text() == fresh


def test_a_record_fills_its_blocks_and_its_picture(copied: Path, record: dict[str, Any]) -> None:
    update(check=False, root=copied)
    assert "Not measured yet." in (copied / "README.md").read_text()
    (copied / "docs" / "presets.md").unlink()  # it asks for rows that this record does not have
    (picture, source), *_ = FIGURES.items()
    (copied / source).mkdir(parents=True)
    of_model = copied / source / "smollm2.json"
    of_model.write_text(json.dumps(record))
    update(check=False, root=copied)
    readme = (copied / "README.md").read_text()
    assert "| rotated:bits=3 | 3.20 | 0.013 |" in readme
    assert readme.index("2 of 4,096 tokens (3,967 positions scored)") < readme.index("make demo"), (
        "the picture has its caption"
    )
    drawn = (copied / picture).read_bytes()
    assert caption(record) in drawn.decode()
    assert b">rotated<" in drawn
    (copied / picture).unlink()
    update(check=False, root=copied)
    assert (copied / picture).read_bytes() == drawn, "the picture is deterministic"
    of_model.write_text(json.dumps(record | {"date": "2025-01-02"}))
    assert not is_fresh(copied / picture, copied / source)


def test_an_unknown_block_says_what_there_is(copied: Path) -> None:
    (copied / "docs" / "codecs.md").write_text("<!-- generated: codec -->\n<!-- /generated -->\n")
    with pytest.raises(InputError, match='Did you mean "codecs"'):
        outdated(copied)


PAPER = """
[paper]
source = "somebody"
columns = [
    { head = "theirs", theirs = "perplexity", form = ".2f" },
    { head = "bits", record = "results/tiny.json", ours = "held_bits", form = ".2f" },
    { head = "ratio", record = "results/tiny.json", ours = "perplexity_ratio", form = ".3f" },
    { head = "KL", record = "results/tiny.json", ours = "logits.4096.kl_mean", times = 1000, form = ".1f" },
]
rows = [
    { name = "FP16", spec = "dense", perplexity = 4.73 },
    { name = "theirs alone", perplexity = 7.0 },
    { name = "ours", spec = "rotated:bits=3" },
]
"""


def test_published_numbers_stand_beside_ours(tmp_path: Path, record: dict[str, Any]) -> None:
    for folder in ("runs", "results", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs/published.toml").write_text(PAPER)
    page = tmp_path / "docs/page.md"
    page.write_text("<!-- generated: runs/published.toml#paper -->\n<!-- /generated -->\n")
    assert update(False, tmp_path) == 0
    assert "| ours | rotated:bits=3 | - | - | - | - |" in page.read_text(), "before it is measured"
    (tmp_path / "results/tiny.json").write_text(json.dumps(record))
    assert update(True, tmp_path) == 1 and update(False, tmp_path) == 0
    text = page.read_text()
    assert "| FP16 | dense | 4.73 | 16.00 | 1.000 | 0.0 (0.0 to 0.0) |" in text
    assert "| theirs alone | - | 7.00 | - | - | - |" in text
    # 230 of 1,000 bytes are 3.68 of 16 bits; a loss that is .013 higher is a perplexity 1.013 times as high.
    assert "| ours | rotated:bits=3 | - | 3.68 | 1.013 | 13.0 (11.7 to 14.3) |" in text and "Theirs: somebody." in text
    for wrong, said in (
        (PAPER.replace("[paper]", "[article]"), 'no table "paper". Allowed: article'),
        (
            PAPER.replace("rotated:bits=3", "rotated:bits=2"),
            'no row "rotated:bits=2". Did you mean "rotated:bits=3"',
        ),
        (PAPER.replace("4096.kl_mean", "4096.kl"), "has no logits.4096.kl of rotated:bits=3"),
    ):
        (tmp_path / "runs/published.toml").write_text(wrong)
        with pytest.raises(InputError, match=said):
            update(True, tmp_path)


def test_a_published_row_means_the_file_of_each_model(tmp_path: Path, record: dict[str, Any]) -> None:
    for folder in ("runs", "results", "docs"):
        (tmp_path / folder).mkdir()
    model = record["run"]["model"]
    record["rows"][1]["spec"] = f"vq:books=codebooks/{model}.safetensors"
    (tmp_path / "results/tiny.json").write_text(json.dumps(record))
    (tmp_path / "runs/published.toml").write_text(
        PAPER.replace("rotated:bits=3", "vq:books=codebooks/{model}.safetensors")
    )
    page = tmp_path / "docs/page.md"
    page.write_text("<!-- generated: runs/published.toml#paper -->\n<!-- /generated -->\n")
    update(False, tmp_path)
    assert "codebooks/{model}.safetensors | - | 3.68 | 1.013 |" in page.read_text()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rotated:bits=3 prefill=packed", ("rotated", "3")),
        ("k=rotated:bits=4,mean=none v=rotated:bits=2 prefill=packed", ("rotated mean=none", "K4 V2")),
        ("k=intn:bits=2,axis=channel v=lloydmax:bits=2", ("intn axis=channel / lloydmax", "2")),
        ("none recent=128 prefill=packed", ("none recent=128", "16")),
        ("terse4", ("terse, the presets", "4")),
        ("terse1", ("terse, the presets", "K2 V1")),
    ],
)
def test_points_are_named_by_codec_and_bits(spec: str, expected: tuple[str, str]) -> None:
    assert family_and_label(str(parse(spec))) == expected


def test_presets_are_bold_among_plain_codecs_by_bits(record: dict[str, Any]) -> None:
    dense, row = record["rows"]
    named = {
        "terse4": 4.2,
        "kivi": 3.0,
        "rotated:bits=3 policy=queryaware": 3.2,
        "vq:dim=4": 2.2,
        "rotated:bits=5": 5.2,
    }
    rows = [
        dense | {"body_bits": 16.0},
        *(row | {"spec": str(parse(spec)), "body_bits": bits} for spec, bits in named.items()),
    ]
    table = by_bits([record | {"rows": rows}, record | {"rows": rows}])
    assert list(table.columns[0].cells) == ["dense", "rotated:bits=5", "**terse4**", "kivi:bits=2"]
    assert len(table.columns) == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = page.parent / target if target else page
        unmade = FIGURES.get(str(path.resolve().relative_to(ROOT)))
        assert path.exists() or (unmade and not (ROOT / unmade).exists()), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_the_first_screen_has_everything() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:29])
    for part in ("docs/images/", "#caption -->", "make demo", "print(cache.report())\n```"):
        assert part in first
    code = fenced("README.md", "python")[0].strip().splitlines()
    assert len([line for line in code if line]) <= 6


@pytest.mark.parametrize("page", ["README.md", "docs/transformers.md", "docs/edge.md"])
def test_python_in_the_pages_runs(
    page: str,
    reader: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one namespace, block after block; `model`, `tokenizer` and `text` are all that is given."""
    monkeypatch.chdir(tmp_path)
    for block in fenced(page, "python"):
        exec(compile(block, page, "exec"), reader)
    said = capsys.readouterr().out
    if page == "README.md":
        cache = reader["cache"]
        assert reader["output"].shape[1] == cache.get_seq_length() + 1
        assert f"ratio {cache.report().ratio:.2f}" in said
        assert "k.codes" in said
        assert reader["model"].config._attn_implementation == "sdpa"


def test_the_run_file_in_the_docs_is_one(tmp_path: Path) -> None:
    (block,) = fenced("docs/evaluation.md", "toml")
    (tmp_path / "run.toml").write_text(block)
    settings = read_run(tmp_path / "run.toml", text="wiki.test.raw")
    assert [str(parse(spec)) for spec in settings.specs] == settings.specs


def test_the_codec_in_contributing_passes_conformance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another package would bring it: a module, and the entry point of the page's TOML block."""
    codec, check = fenced("CONTRIBUTING.md", "python")
    (toml,) = fenced("CONTRIBUTING.md", "toml")
    points = tomllib.loads(toml)["project"]["entry-points"]["tersekv.codecs"]
    (tmp_path / "tersekv_nf4.py").write_text(codec)
    about = tmp_path / "tersekv_nf4-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tersekv-nf4\nVersion: 1.0\n")
    lines = [f"{name} = {where}" for name, where in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[tersekv.codecs]", *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    codecs.cache_clear()
    try:
        exec(compile(check, "CONTRIBUTING.md", "exec"), {})
        nf4 = parse("nf4").k
        x = torch.randn(4, 64, 128)
        error = (nf4.decode(nf4.encode(x)) - x).square().mean()
        assert 0.005 < error < 0.02, "worse than Lloyd-Max with 4 bits (0.0095), better than with 3 (0.035)"
    finally:
        codecs.cache_clear()
        sys.modules.pop("tersekv_nf4", None)


def test_the_demo_has_enough_to_read() -> None:
    """`tersekv try` takes 2,000 tokens of README and docs; four characters a token is the usual rule."""
    assert sum(len(page.read_text()) for page in PAGES if page.name != "CONTRIBUTING.md") > 10_000


def test_a_caption_tells_of_a_model_that_predicts_nothing() -> None:
    record = json.loads((ROOT / "results/models/smollm2.json").read_text())
    assert "perplexity is" not in caption(record)
    record["rows"][0]["logits"]["1024"]["perplexity"] = 12219.16
    assert "perplexity is 12,219: it does not predict this text" in caption(record)
