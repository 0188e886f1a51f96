"""The repository keeps its own rules: packaging, what is never imported, sizes, pinned tools."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIDE_FOLDERS = ("connectors", "compression", "transfer", "gpu")
PRODUCT_FOLDERS = ("kvstore", "deploy", *SIDE_FOLDERS)

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500

# What runs code that it finds in bytes.
BANNED_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code"}
BANNED_CALLS = {"eval", "exec", "__import__", "torch.load", "yaml.load"}
ENGINE_PACKAGES = ("torch", "transformers", "vllm", "sglang", "cupy", "nixl", "opentelemetry")
# Put together here, so that this file does not hold the words.
UNFINISHED = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_in(folders: tuple[str, ...], *suffixes: str) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(ROOT / folder):
            yield from (Path(place, name) for name in names if name.endswith(suffixes))


def product_files() -> list[Path]:
    return [*files_in(PRODUCT_FOLDERS, ".py"), *ROOT.glob("*.py")]


def python_files() -> list[Path]:
    return [*product_files(), *files_in(("tests",), ".py")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- packaging ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", SIDE_FOLDERS)
def test_a_side_folder_is_reached_through_its_link_and_is_no_package_itself(folder: str) -> None:
    link = ROOT / "kvstore" / folder
    assert link.readlink() == Path("..", folder)
    assert link.resolve() == ROOT / folder
    # With this file in compression/, nothing of Python 3.14 starts in the repository's root.
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_core_depends_on_no_engine() -> None:
    needed = " ".join(PROJECT["project"]["dependencies"])
    assert not [name for name in ENGINE_PACKAGES if name in needed]


def test_development_tools_are_pinned_exactly() -> None:
    groups = PROJECT["dependency-groups"]
    entries = [entry for group in groups.values() for entry in group if isinstance(entry, str)]
    assert [entry for entry in entries if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", entry)] == []


def test_daemon_and_client_import_without_any_engine() -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ENGINE_PACKAGES)
    code = (
        f"import sys; {blocked}\n"
        "import kvstore.app, kvstore.cli, kvstore.doctor, kvstore.client.sync, kvstore.client.aio\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is never written ---------------------------------------------------------------


def banned_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                modules = {alias.name.partition(".")[0] for alias in names}
                yield from modules & BANNED_IMPORTS
            case ast.ImportFrom(module=str(module)):
                yield from {module.partition(".")[0]} & BANNED_IMPORTS
            case ast.Call(func=function):
                yield from {ast.unparse(function)} & BANNED_CALLS


def test_no_code_is_made_from_data() -> None:
    found = [
        f"{name_of(path)}: {name}"
        for path in product_files()
        for name in banned_names(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code", ["import pickle", "from marshal import loads", "eval(x)", "torch.load(f)"]
)
def test_the_ban_finds_what_it_bans(code: str) -> None:
    assert list(banned_names(ast.parse(code)))


def test_nothing_is_left_for_later() -> None:
    places = [
        *files_in((*PRODUCT_FOLDERS, "tests", "docs"), ".py", ".c", ".h", ".cu", ".cuh", ".md")
    ]
    places += [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py")]
    unfinished = [name_of(path) for path in places if UNFINISHED.search(path.read_text())]
    assert unfinished == []


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    odd = re.compile(r"(^|_)(utils?|helpers?|misc|common|manager)\.py$")
    assert [name_of(path) for path in python_files() if odd.search(path.name)] == []


# --- sizes -------------------------------------------------------------------------------


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of *function* without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_no_function_is_long() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}: {body_lines(node)} lines"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and body_lines(node) > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_no_file_is_long() -> None:
    native = files_in((*PRODUCT_FOLDERS, "tests"), ".c", ".h", ".cpp", ".cu", ".cuh")
    files = [*python_files(), *native]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > FILE_LINES_MAX} == {}
