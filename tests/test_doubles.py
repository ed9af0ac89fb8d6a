"""Tests put doubles where a name is defined, or hand them over.

A name that a module has imported by ``from x import y`` is a copy: a test that replaces it there misses every other
module that has one, and says nothing when the code moves.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PRODUCT = ("lion_dist", "launch", "comparison", "compare_engines", "train", "rounds_study", "precision_study")
REPLACERS = ("setattr", "object", "patch")  # monkeypatch.setattr, mock.patch.object, mock.patch


def source_of(module: str) -> ast.Module | None:
    """None: there is no such module, or it is not written in Python."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return (
        ast.parse(Path(found.origin).read_text()) if found and found.origin and found.origin.endswith(".py") else None
    )


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What ``from x import y`` and ``import x as y`` bind at the top level: name -> x.y, or x."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return names


def is_a_copy(module: str, name: str) -> bool:
    """Whether ``name`` in ``module`` of the product is something that the product has defined elsewhere."""
    tree = source_of(module) if module.split(".")[0] in PRODUCT else None
    origin = imported_names(tree).get(name, "") if tree is not None else ""
    return origin.split(".")[0] in PRODUCT and source_of(origin) is None  # a module is no copy


def replaced(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of each replacement that can be read off the source."""
    modules = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    yield node.lineno, modules.get(target.value.id, ""), target.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in REPLACERS and node.args:
            first, *others = node.args
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, *first.value.rpartition(".")[::2]
            elif isinstance(first, ast.Name) and others and isinstance(others[0], ast.Constant):
                yield node.lineno, modules.get(first.id, ""), others[0].value


def files() -> list[Path]:
    return sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_replaces_a_name_that_a_module_has_imported(path):
    names = replaced(ast.parse(path.read_text()))
    assert [f"line {line}: {module}.{name}" for line, module, name in names if is_a_copy(module, name)] == []


def test_a_replaced_copy_is_found():
    test = """
from lion_dist import lion
from unittest import mock
def test(monkeypatch):
    monkeypatch.setattr(lion, "check_hyperparameters", None)
    monkeypatch.setattr("lion_dist.lion.check_hyperparameters", None)
    mock.patch.object(lion, "check_hyperparameters")
    lion.check_hyperparameters = None
    monkeypatch.setattr(lion, "Lion", None)
"""
    found = [is_a_copy(module, name) for _, module, name in replaced(ast.parse(test))]
    assert sorted(found) == [False, True, True, True, True]
