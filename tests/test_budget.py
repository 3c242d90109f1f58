"""The size of the code against a budget. Raise a budget in the commit that needs it, and say why."""

import ast
from collections import defaultdict
from pathlib import Path
from statistics import median

from tersekv.terminal import to_text

SOURCE = Path(__file__).parents[1] / "src" / "tersekv"
# Lines of each folder, comments and blank lines included; ruff's format and line length apply, so golf gains nothing.
BUDGET = {
    ".": 4075,
    "bench": 2600,
    "calibrate": 1490,
    "codecs": 1620,
    "eval": 1570,
    "hf": 1790,
    "models": 600,
    "ops": 1870,
    "ops/cuda": 1480,
    "policy": 1425,
    "reports": 975,
}
FILE, MEDIAN_FILE, FUNCTION, SHORT_FUNCTIONS = 250, 120, 40, 0.9


def files() -> dict[Path, str]:
    return {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def function_lines(text: str) -> list[int]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def table(lines: dict[Path, int]) -> str:
    from rich.table import Table

    folders: dict[str, list[int]] = defaultdict(list)
    for path, count in lines.items():
        folders[str(path.parent)].append(count)
    shown = Table("folder", "files", "lines", "budget")
    for folder, counts in sorted(folders.items()):
        shown.add_row(folder, f"{len(counts)}", f"{sum(counts):,}", f"{BUDGET.get(folder, 0):,}")
    shown.add_row("all", f"{len(lines)}", f"{sum(lines.values()):,}", f"{sum(BUDGET.values()):,}")
    return to_text(shown)


def test_folders_keep_their_budget() -> None:
    lines = {path: len(text.splitlines()) for path, text in files().items()}
    print("\n" + table(lines))
    spent: dict[str, int] = defaultdict(int)
    for path, count in lines.items():
        spent[str(path.parent)] += count
    assert set(spent) == set(BUDGET), "a folder needs a budget, a budget needs a folder"
    over = {folder: count for folder, count in spent.items() if count > BUDGET[folder]}
    assert not over, f"over budget: {over}\n{table(lines)}"


def test_files_are_small() -> None:
    lines = {str(path): len(text.splitlines()) for path, text in files().items()}
    assert {path: count for path, count in lines.items() if count > FILE} == {}
    assert median(lines.values()) <= MEDIAN_FILE


def test_functions_are_small() -> None:
    counts = [count for text in files().values() for count in function_lines(text)]
    short = sum(count <= FUNCTION for count in counts) / len(counts)
    print(f"\n{len(counts)} functions, {100 * short:.1f} % of at most {FUNCTION} lines, longest {max(counts)}")
    assert short >= SHORT_FUNCTIONS
