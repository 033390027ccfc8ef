"""The one setting that pyproject.toml cannot hold: README.md without relative links, for a package index."""

import re
from pathlib import Path

from setuptools import setup

# The repository has no public address. With one: set `urls` in pyproject.toml, and let `long_description` prefix
# targets, f"{url}/blob/HEAD/" of links and f"{url}/raw/HEAD/" of pictures, instead of leaving them out.
_PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https://)[^)\s]+\)\n+", flags=re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https://)[^)\s]+\)")


def long_description(readme: str) -> str:
    """``readme`` without pictures of the repository, and with text in place of links to its files."""
    return _LINK.sub(r"\1", _PICTURE.sub("", readme))


if __name__ == "__main__":
    setup(
        long_description=long_description(Path(__file__).with_name("README.md").read_text()),
        long_description_content_type="text/markdown",
    )
