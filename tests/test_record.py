"""A record names the commit and the processor it was made with."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tersekv import record

ROOT = Path(__file__).parents[1]
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]


def test_checkout_and_archive_name_the_same_commit(tmp_path: Path) -> None:
    checkout, archive = tmp_path / "checkout", tmp_path / "checkout" / "archive"
    source = checkout / "src" / "tersekv" / "some.py"
    source.parent.mkdir(parents=True)
    source.touch()
    for name in (".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / name, checkout / name)

    def git(*arguments: str) -> str:
        done = subprocess.run([*GIT, *arguments], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert record._commit(checkout) == head
    git("archive", "--output", "archive.zip", "HEAD")
    shutil.unpack_archive(checkout / "archive.zip", archive)
    git("commit", "--allow-empty", "-m", "second")
    # The archive lies inside a checkout whose commit is another by now.
    assert record._commit(archive) == head != record._commit(checkout)
    named = []
    for text in ("changed", "changed again", "changed"):
        source.write_text(text)
        named.append(record._commit(checkout))
        assert re.fullmatch(r"[0-9a-f]{40}\+changes\.[0-9a-f]{8}", named[-1])
    assert named[0] == named[2] != named[1]
    (source.parent / "untracked.py").write_text("new")
    assert record._commit(checkout) not in named


def test_no_git_and_no_archive_is_an_unknown_commit(tmp_path: Path) -> None:
    assert record._commit(tmp_path) == "unknown"


def test_a_processor_is_named_where_linux_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n\n")
    monkeypatch.setattr(record, "CPU_FACTS", facts)
    assert record.processor().startswith("AMD EPYC cpu family 25 model 17 ")
    monkeypatch.setattr(record, "CPU_FACTS", tmp_path / "none")
    assert record.processor() and "EPYC" not in record.processor()
