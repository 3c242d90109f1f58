"""The command line: help as snapshots, JSON that parses, and errors that say what to do.

After a change of the options renew the snapshots: `TERSEKV_WRITE_HELP=1 .venv/bin/pytest tests/test_cli.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model

from tersekv.cli import main
from tersekv.registry import POLICIES, PRESETS
from tersekv.spec import codecs, parse

HELP = Path(__file__).parent / "help"
VERBS = {
    "tersekv": [],
    "try": ["try"],
    "list": ["list"],
    "info": ["info"],
    "plan": ["plan"],
    "doctor": ["doctor"],
    "eval": ["eval"],
    "report": ["report"],
    "calibrate": ["calibrate"],
    "calibrate-adaptive": ["calibrate", "adaptive"],
    "calibrate-budget": ["calibrate", "budget"],
    "calibrate-klt": ["calibrate", "klt"],
    "calibrate-kvquant": ["calibrate", "kvquant"],
    "calibrate-vq": ["calibrate", "vq"],
    "bench": ["bench"],
    "bench-encode": ["bench", "encode"],
    "bench-attend": ["bench", "attend"],
    "bench-decode": ["bench", "decode"],
    "bench-generate": ["bench", "generate"],
}
SCRIPT = """
import sys
from tersekv.cli import main
for words in {verbs}:
    try:
        main([*words, "--help"])
    except SystemExit as done:
        assert not done.code
    print("\\f", end="")
loaded = {{"torch", "transformers"}} & set(sys.modules)
assert not loaded, f"--help loads {{loaded}}"
"""


@pytest.fixture(scope="session")
def helps() -> dict[str, str]:
    """Every verb's help, 80 columns wide, from a process of its own that fails if it loads torch."""
    plain = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    coloured = ("FORCE_COLOR", "TTY_COMPATIBLE")
    environment = {name: text for name, text in os.environ.items() if name not in coloured} | plain
    script = SCRIPT.format(verbs=list(VERBS.values()))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\f")[: len(VERBS)]
    return {name: "\n".join(map(str.rstrip, text.splitlines())) for name, text in zip(VERBS, texts, strict=True)}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_the_snapshot_and_loads_no_torch(helps: dict[str, str], verb: str) -> None:
    snapshot = HELP / f"{verb}.txt"
    if os.environ.get("TERSEKV_WRITE_HELP"):
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(helps[verb] + "\n")
    assert snapshot.read_text() == helps[verb] + "\n", __doc__


def test_every_verb_has_a_snapshot(helps: dict[str, str]) -> None:
    assert {path.stem for path in HELP.glob("*.txt")} == set(VERBS)
    assert all(f" {verb} " in helps["tersekv"] for verb in VERBS if verb != "tersekv" and "-" not in verb)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line here and returns its exit status, output and errors; lines are not broken."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


def test_list_names_every_codec_and_preset(said: Any) -> None:
    status, shown, _ = said("list")
    assert status == 0
    assert all(name in shown for name in (*codecs(), *POLICIES, *PRESETS))
    status, text, _ = said("list", "--json")
    listed = json.loads(text)
    assert {row["name"] for row in listed["codecs"]} == set(codecs())
    assert [row["name"] for row in listed["policies"]] == list(POLICIES)
    assert listed["presets"] == PRESETS


@pytest.mark.parametrize("spec", ["none", "intn", "lloydmax", "rotated", "k=rotated:bits=4 v=intn:bits=2"])
@pytest.mark.parametrize("d", [64, 80])
def test_info_shows_every_plane(said: Any, spec: str, d: int) -> None:
    status, shown, _ = said("info", spec, "--head-dim", str(d))
    assert status == 0
    bar = shown.rpartition("\n|")[2]
    parsed = parse(spec)
    planes = [(side, plane) for side in "kv" for plane in getattr(parsed, side).layout(d).planes]
    for number, (side, plane) in enumerate(planes):
        letter = chr(ord("A") + number)
        assert f"{letter} {side}.{plane.name}" in bar
        assert letter in bar.partition("|")[0]
    facts = json.loads(said("info", spec, "--head-dim", str(d), "--json")[1])
    assert [(row["side"], row["name"], row["bytes"]) for row in facts["planes"]] == [
        (side, plane.name, plane.nbytes) for side, plane in planes
    ]
    assert f"{facts['page_bytes']:,} bytes" in shown
    assert facts["bytes_per_token"] == facts["page_bytes"] / 64


def test_info_of_a_model_says_what_a_context_costs(said: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    status, text, _ = said("info", "terse4", "--model", str(folder), "--context", "1024", "--json")
    facts = json.loads(text)
    assert status == 0
    assert facts["head_dim"] == facts["model"]["head_dim"] == 8
    assert facts["model"]["dense"] == 1024 * 2 * 8 * 2  # tokens, K and V, head dim, bytes; one layer, one KV head
    blocks, beside = (1024 - 4 - 64) // 64, 2 * 8 * 8 + 4 * 8  # `QueryAware.beside`
    assert facts["model"]["packed"] == blocks * facts["page_bytes"] + (1024 - 64 * blocks) * 2 * 8 * 2 + beside
    assert "1,024 tokens" in said("info", "terse4", "--model", str(folder), "--context", "1024")[1]


def test_doctor_says_what_runs_and_why_not(said: Any) -> None:
    status, shown, _ = said("doctor")
    assert status == 0
    assert "reference" in shown
    assert "torch" in shown
    diagnosis = json.loads(said("doctor", "--json")[1])
    first, *others = diagnosis["implementations"]["cpu"]
    assert first["runs"]
    assert all(row["why"].endswith(".") for row in (first, *others))


def test_try_on_a_model_folder(said: Any, tmp_path: Path) -> None:
    folder, prompt = save_tiny_model(tmp_path / "tiny"), tmp_path / "prompt.txt"
    prompt.write_text("hello")
    arguments = ["try", "terse4", "none", "--model", str(folder), "--file", str(prompt), "--max-new-tokens", "3"]
    status, text, _ = said(*arguments, "--json")
    trial = json.loads(text)
    assert status == 0
    assert [row["spec"] for row in trial["rows"]] == ["dense", str(parse("terse4")), "none"]
    assert trial["prompt_tokens"] == 1
    status, shown, _ = said(*arguments)
    assert all(word in shown for word in ("dense", "terse4", "ratio", "tokens/s"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "rotatd:bits=3"], 'Did you mean "rotated"?'),
        (["info", "rotated:bit=3"], 'Did you mean "bits"?'),
        (["info", "rotated:bits=9"], "Allowed: 1 to 8"),
        (["info", "intn:group=48", "--head-dim", "80"], "head_dim 80: group=48 does not divide it. Allowed: 16"),
        (["info", "terse4", "--model", "smolm2"], 'Did you mean "smollm2"?'),
        (["try", "tersse4"], 'Did you mean "terse'),
        (["try", "--file", "no-such-file.txt"], "no-such-file.txt cannot be read"),
        (["eval", "no-such-file.toml"], "no-such-file.toml is not a run file"),
        (["info", "--hed-dim", "64"], "Did you mean --head-dim?"),
        (["lst"], "list"),
    ],
)
def test_bad_input_is_status_2_and_a_sentence(said: Any, arguments: list[str], words: str) -> None:
    status, out, err = said(*arguments)
    assert status == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err
