"""Generates the pages of the documentation site: the repository's Markdown files at their own paths, and the API.

A page has the path of its file, so that links between files, and to pictures, are the pages' links too. A link to any
other file of the repository becomes text, since the repository has no public address.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCED = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")

API = {
    "optimizers": (
        "sharded_lamb.ShardedLamb",
        "sharded_lamb.Lamb",
        "sharded_lamb.VARIANTS",
        "sharded_lamb.optim.explanation",
        "sharded_lamb.__version__",
    ),
    "checkpoint": ("sharded_lamb.checkpoint",),
    "telemetry": ("sharded_lamb.telemetry",),
    "watchdog": ("sharded_lamb.watchdog",),
    "deepspeed": ("sharded_lamb.deepspeed",),
    "integrations": (
        "sharded_lamb.integrations.transformers",
        "sharded_lamb.integrations.accelerate",
        "sharded_lamb.integrations.lightning",
        "sharded_lamb.integrations.timm",
        "sharded_lamb.integrations.open_clip",
        "sharded_lamb.integrations.torchtitan",
    ),
    "timeline": ("sharded_lamb.timeline",),
    "faults": ("sharded_lamb.faults",),
    "verify": ("sharded_lamb.verify",),
}
"""{page: the objects that it documents}; of a module, every public name."""


def sources() -> list[str]:
    """The Markdown files that become pages: paths from the root."""
    beside_code = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "sharded_lamb").rglob("*.md"))
    return ["README.md", "CHANGELOG.md", "launch/README.md", "configs/deepspeed/README.md", *beside_code]


def pictures(source: str, text: str) -> Iterator[str]:
    """The pictures that the file ``source`` shows: paths from the root."""
    for target in _PICTURE.findall(text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def page(source: str, text: str, pages: list[str]) -> str:
    """``text`` of the file ``source`` with text in place of links to files that are not among ``pages``."""

    def link(match: re.Match[str]) -> str:
        name, target = match.groups()
        if target.startswith(("http://", "https://", "#")):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))
        if path in pages:
            return match[0]
        if name.strip("`") in (path, target):
            return f"`{path}`"
        return f"{name} (`{posixpath.basename(path)}`)"  # whole paths would widen tables

    parts = _FENCED.split(text)
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def api_page(name: str) -> str:
    """The page ``name`` of the API, for mkdocstrings."""
    title = {"deepspeed": "DeepSpeed", "faults": "Fault injection"}.get(name, name.capitalize())
    return "\n\n".join([f"# API: {title}", *(f"::: {path}" for path in API[name])]) + "\n"


def write(put: Callable[[str, bytes], None]) -> None:
    """Calls ``put(path, content)`` for every page and picture."""
    pages = sources()
    for source in pages:
        text = (ROOT / source).read_text()
        put(source, page(source, text, pages).encode())
        for picture in pictures(source, text):
            put(picture, (ROOT / picture).read_bytes())
    for name in API:
        put(f"api/{name}.md", api_page(name).encode())


if __name__ == "<run_path>":  # by mkdocs-gen-files
    import mkdocs_gen_files

    def _put(path: str, content: bytes) -> None:
        with mkdocs_gen_files.open(path, "wb") as file:
            file.write(content)

    write(_put)
