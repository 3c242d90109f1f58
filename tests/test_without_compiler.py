"""An install without a compiler: pure Python, says what is missing, and runs the reference."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
sys.path[:0] = [{target!r}, {packages!r}]  # and not what .pth files add: the development install
import numpy as np, torch, tersekv
from importlib.util import find_spec
from tersekv.ops import explain, implementation, native
from tersekv.spec import parse
from tersekv.store import Store

assert tersekv.__file__.startswith({target!r}), tersekv.__file__
store = Store(parse("rotated:bits=3"), 1, 1, 64, torch.float32, torch.device("cpu"))
for n in (200, 1):
    q, k, v = torch.randn(3, 1, 1, n, 64)
    out = store.extend(q, k, v, np.zeros(1, dtype=np.int64), 0.125)
from tersekv.doctor import diagnose
rows = diagnose().as_dict()["implementations"]["cpu"]
print(json.dumps({{"native": find_spec("tersekv._native") is not None, "runs": implementation("cpu"),
    "finite": bool(torch.isfinite(out).all()), "rows": rows}}))
"""


@pytest.mark.skipif(find_spec("scikit_build_core") is None, reason="scikit-build-core is not installed")
def test_install_without_a_compiler(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    ignore = shutil.ignore_patterns(".*", "__pycache__")
    for name in ("src", "native", "docs", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    broken = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], env=broken, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = SCRIPT.format(target=str(target), packages=sysconfig.get_path("purelib"))
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["native"] and said["runs"] == "reference" and said["finite"]
    missing = next(row for row in said["rows"] if row["name"] == "native")
    assert not missing["runs"] and "not built" in missing["why"] and "reinstall" in missing["why"]
