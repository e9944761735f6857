"""The table of layers (who may import whom), executed on the source of the whole repository."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top-level packages that each of ours may import, besides itself and the standard library. "*" is any but FORBIDDEN.
ALLOWED = {
    "score_mods": {"torch"},
    "scan_kernels": {"torch", "triton"},
    "flexrattn": {"*"},
}
# Nothing importable may reach up.
FORBIDDEN = {"tests", "benchmarks", "configs", "docs", "train"}
# The one place that may draw, and only when it is asked to.
EXCEPTIONS = {("score_mods/show.py", "matplotlib")}

BLOCK_MASK_BUILDER = "score_mods/block_masks.py"


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def wrong_imports(package: str, tree: ast.AST, name: str) -> list[str]:
    allowed = ALLOWED[package]
    wrong = []
    for imported in imports(tree):
        if imported == package or imported in sys.stdlib_module_names or (name, imported) in EXCEPTIONS:
            continue
        if imported in FORBIDDEN or (imported not in allowed and "*" not in allowed):
            wrong.append(f"{name} imports {imported}")
    return wrong


def builder_names(tree: ast.AST) -> list[int]:
    """Lines that name torch's create_block_mask (a text that only mentions it is none)."""
    lines = []
    for node in ast.walk(tree):
        named = {
            ast.Name: lambda n: n.id,
            ast.Attribute: lambda n: n.attr,
            ast.alias: lambda n: n.name.rpartition(".")[2],
        }.get(type(node))
        if named is not None and named(node) == "create_block_mask":
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_stay_in_their_layer(package):
    wrong = []
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        wrong += wrong_imports(package, ast.parse(path.read_text(encoding="utf-8")), name)
    assert not wrong


def test_score_mods_is_looked_at():
    assert sources("score_mods")


def test_matplotlib_is_imported_only_when_asked_to_draw():
    for path in sources("score_mods"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert isinstance(node, ast.FunctionDef) or "matplotlib" not in imports(node), path


def test_one_file_calls_create_block_mask():
    folders = ("score_mods", "scan_kernels", "flexrattn", "configs", "benchmarks", "docs", "tests")
    paths = [*sources(*folders), *ROOT.glob("*.py")]
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if builder_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert callers == {BLOCK_MASK_BUILDER}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("score_mods", "import scan_kernels"),
        ("score_mods", "def f():\n    from flexrattn.model import x"),
        ("score_mods", "import numpy as np"),
        ("scan_kernels", "from score_mods import causal"),
        ("scan_kernels", "import torchtitan.models"),
        ("flexrattn", "from tests.helpers import x"),
    ],
)
def test_a_broken_layer_is_seen(package, source):
    assert wrong_imports(package, ast.parse(source), "a.py")


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn.attention.flex_attention import create_block_mask as build",
        "from torch.nn.attention import flex_attention\nflex_attention.create_block_mask(m, 1, 1, 8, 8)",
    ],
    ids=["imported under another name", "as an attribute"],
)
def test_a_second_builder_is_seen(source):
    assert builder_names(ast.parse(source))
