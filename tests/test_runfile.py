"""Run files: those of the project can be read, and what is wrong with others is said."""

from pathlib import Path

import pytest

from tersekv import InputError, parse
from tersekv.errors import CacheFileError
from tersekv.eval.runfile import read_run
from tersekv.reports.replications import PUBLISHED


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model = 3 = 4", "is not a run file"),
        ('model = "x"\nmodle = "x"', 'unknown field "modle". Did you mean "model"'),
        ('model = "x"\n[logits]', "specs missing"),
        ('model = "x"\nspecs = ["rotated:bits=4"]', r"measures nothing. Add a section: \[tensors\]"),
        (
            'model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nchunks = 3',
            r'\[logits\]: unknown field "chunks". Did you mean "chunk"',
        ),
        ('model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nwindows = ["a"]', r"windows = \['a'\] is no list"),
        (
            'model = "x"\nspecs = ["rotated:bits=4"]\nreference = "rotated:bits=3"\n[tensors]',
            'reference = "rotated:bits=3" is none of specs. Did you mean "rotated:bits=4"',
        ),
        ('model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nwindows = [99]', "Each length must be from score_from"),
    ],
)
def test_bad_run_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=said):
        read_run(file)


@pytest.mark.parametrize(
    "path",
    sorted(set((Path(__file__).parents[1] / "runs").glob("*.toml")) - {Path(__file__).parents[1] / PUBLISHED}),
    ids=lambda path: path.stem,
)
def test_run_files_of_the_project_can_be_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = {"antkv": "vq", "codebooks": "vq", "codebooks-rope": "vq", "fitted": "klt", "klt": "klt"}
    fitted |= {"kvquant": "kvquant"}
    if path.stem in fitted:  # its books are fitted first
        said = rf'cannot be read.* "tersekv calibrate {fitted[path.stem]} MODEL --text FILE"'
        with pytest.raises(CacheFileError, match=said):
            [parse(spec) for spec in read_run(path).specs]
    elif not path.stem.startswith("attend"):
        assert all(parse(spec) for spec in read_run(path).specs)
