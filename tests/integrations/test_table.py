"""The table of frameworks in sharded_lamb/integrations/README.md names tests that exist."""

import ast
import re
from pathlib import Path

import sharded_lamb

FOLDER = Path(sharded_lamb.__file__).parent / "integrations"
README = (FOLDER / "README.md").read_text()
LINKS = re.findall(r'\]\((\S+) "(\w+)"\)', README)


def test_every_link_names_a_test() -> None:
    assert LINKS
    for file, name in LINKS:
        source = ast.parse((FOLDER / file).resolve().read_text())
        functions = {node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"


def test_every_yes_is_a_link() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ") and "yes" in line]
    assert rows
    for row in rows:
        assert row.count("yes") == row.count("[yes]("), row


def test_the_folder_itself_imports_nothing() -> None:
    for path in (FOLDER / "__init__.py", FOLDER / "examples" / "__init__.py"):
        assert [type(node) for node in ast.parse(path.read_text()).body] == [ast.Expr], path
