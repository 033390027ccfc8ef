"""setuptools, with what pyproject.toml cannot hold: the files of a source distribution (manifest.in), and README.md
without relative links, for a package index. A build runs it in a process of its own.
"""

import re
from functools import partial
from pathlib import Path

import setuptools
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.egg_info import manifest_maker

# The repository has no public address. With one: set `urls` in pyproject.toml, and let `long_description` prefix
# targets, f"{url}/blob/HEAD/" of links and f"{url}/raw/HEAD/" of pictures, instead of leaving them out.
_PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https://)[^)\s]+\)\n+", flags=re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https://)[^)\s]+\)")


def long_description(readme: str) -> str:
    """``readme`` without pictures of the repository, and with text in place of links to its files."""
    return _LINK.sub(r"\1", _PICTURE.sub("", readme))


manifest_maker.template = "configs/manifest.in"
setuptools.setup = partial(
    setuptools.setup,
    long_description=long_description(Path(__file__).parents[1].joinpath("README.md").read_text()),
    long_description_content_type="text/markdown",
)
