"""Frameworks are imported by the module of integrations that is for them, and that module by its users."""

import ast
from pathlib import Path

import sharded_lamb

PACKAGE = Path(sharded_lamb.__file__).parent


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Names of modules that a file imports, at any depth; ``at_once``: at its top."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_package_imports_no_integration() -> None:
    """Recipes are users: where they run with a framework, they import its module."""
    outside = [path for path in PACKAGE.rglob("*.py") if path.parts[len(PACKAGE.parts)] != "integrations"]
    assert len(outside) > 100
    for path in outside:
        is_recipe = path.parts[len(PACKAGE.parts)] == "recipes"
        found = [
            name for name in imported(path, at_once=is_recipe) if name.startswith("sharded_lamb.integrations")
        ]
        assert not found, path


def test_the_folder_itself_imports_no_framework() -> None:
    assert imported(PACKAGE / "integrations" / "__init__.py") == set()
