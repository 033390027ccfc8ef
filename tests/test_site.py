"""The documentation site: built strictly, without a network, and complete."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import sharded_lamb

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("launch", "configs", "sharded_lamb")
BESIDE_CODE = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")]
PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *BESIDE_CODE))
MODULES = ("checkpoint", "watchdog", "deepspeed", "timeline", "faults", "verify")
INTEGRATIONS = sorted(path.stem for path in (ROOT / "sharded_lamb/integrations").glob("[!_]*.py"))


class Html(HTMLParser):
    """What a page holds: the targets of its links, pictures, scripts and styles; its anchors; its text without code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.pictures: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self._in_code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.targets += [values[name] for name in ("href", "src") if name in values]
        if tag in ("script", "img", "link"):
            self.loaded += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.pictures.append(values["src"])
        self._in_code += tag in ("code", "pre", "script")

    def handle_endtag(self, tag: str) -> None:
        self._in_code -= tag in ("code", "pre", "script")

    def handle_data(self, data: str) -> None:
        if not self._in_code:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Html]:
    """{the path of a page: what it holds}, of the site that `launch/site` builds."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    built = subprocess.run(
        [ROOT / "launch/site", "--use-current-env"],
        env={**os.environ, **nowhere, "PATH": paths, "PYTHONPATH": str(ROOT), "SITE": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stderr
    assert built.stdout.strip() == str(folder / "index.html")
    return {path: Html(path) for path in folder.rglob("*.html")}


def folder_of(site: dict[Path, Html]) -> Path:
    return min(site, key=lambda path: len(path.parts)).parent


def page_of(site: dict[Path, Html], source: Path) -> Html:
    path = source.with_name("index.html" if source.name == "README.md" else f"{source.stem}.html")
    return site[folder_of(site) / path]


@pytest.mark.parametrize("source", PAGES, ids=str)
def test_every_markdown_file_is_a_page(site: dict[Path, Html], source: Path) -> None:
    text = (ROOT / source).read_text()
    built = page_of(site, source)
    title = re.sub(r"[`\[\]]", "", text.splitlines()[0].removeprefix("# "))
    assert title in built.text
    assert len(built.pictures) == len(re.findall(r"!\[", text))
    assert "](" not in built.text, "a link that was not understood"


def public_names(source: Path) -> list[str]:
    """``__all__`` of a module, else its functions and classes."""
    body = ast.parse(source.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node.name for node in definitions if not node.name.startswith("_")]


def test_the_public_names_of_the_package_are_documented(site: dict[Path, Html]) -> None:
    anchors = site[folder_of(site) / "api/optimizers.html"].anchors
    assert {f"sharded_lamb.{name}" for name in sharded_lamb.__all__} <= anchors
    for name in ("trust_ratios", "grad_norm", "full_state_dict", "no_sync", "close", "step"):
        assert f"sharded_lamb.ShardedLamb.{name}" in anchors


@pytest.mark.parametrize("module", [*MODULES, *(f"integrations/{name}" for name in INTEGRATIONS)])
def test_the_public_names_of_modules_are_documented(site: dict[Path, Html], module: str) -> None:
    path = ROOT / "sharded_lamb" / module
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    dotted = f"sharded_lamb.{module.replace('/', '.')}"
    wanted = {f"{dotted}.{name}" for name in public_names(source)} | {dotted}
    assert sorted(wanted - site[folder_of(site) / f"api/{module.partition('/')[0]}.html"].anchors) == []


def broken(site: dict[Path, Html]) -> Iterator[str]:
    for path, page in site.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or path.name == "404.html":
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                yield f"{path.name}: {target}"
            elif parts.fragment and there in site and unquote(parts.fragment) not in site[there].anchors:
                yield f"{path.name}: {target}: no such heading"


def test_links_and_pictures_resolve(site: dict[Path, Html]) -> None:
    assert sum(len(page.targets) for page in site.values()) > 500
    assert list(broken(site)) == []


def test_pages_load_nothing_from_elsewhere(site: dict[Path, Html]) -> None:
    loaded = [target for page in site.values() for target in page.loaded]
    assert [target for target in loaded if urlsplit(target).netloc] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](../optim/README.md#options)", "[a](../optim/README.md#options)"),
        ("[a](https://x.org/y) [b](#here)", "[a](https://x.org/y) [b](#here)"),
        ("![a](x.png)", "![a](x.png)"),
        ("[exact](../../tests/test_site.py)", "exact (`test_site.py`)"),
        ("[`tests/x.py`](../../tests/x.py)", "`tests/x.py`"),
        ("```\n[a](b.py)\n```\n[a](b.py)", "```\n[a](b.py)\n```\na (`b.py`)"),
    ],
)
def test_links_that_leave_the_site_become_text(text: str, expected: str) -> None:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "configs/site_pages.py")
    assert spec
    assert spec.loader
    site_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site_pages)
    assert site_pages.page("sharded_lamb/plan/README.md", text, ["sharded_lamb/optim/README.md"]) == expected
