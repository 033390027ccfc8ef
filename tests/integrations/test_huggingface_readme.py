"""sharded_lamb/integrations/README.md: snippets of Hugging Face's frameworks, and the tests that its table names."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from sharded_lamb import integrations
from tests.harness import run_ranks
from tests.integrations import regression
from tests.integrations.test_trainer import arguments
from tests.sharding.test_whole_states import begin_anew

README = (Path(integrations.__file__).parent / "README.md").read_text()
TESTS = Path(__file__).parent


def snippet(heading: str) -> str:
    section = README.split(f"\n## {heading}\n", 1)[1]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0]


def run(rank: int, heading: str, folder: str) -> int:
    begin_anew()
    space: dict[str, Any] = {
        "model": regression.Regression(),
        "arguments": arguments(f"{folder}/run", save_strategy="steps"),
        "rows": regression.DATA,
        "loader": DataLoader(regression.DATA, batch_size=2),
    }
    begin_anew()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(snippet(heading), "README.md", "exec"), space)
    return len(space["optimizer"].param_groups)


@pytest.mark.parametrize(
    ("heading", "saved"),
    [("Hugging Face's Trainer", "run/checkpoint-4/optimizer.pt"), ("Accelerate", "saved/optimizer.bin")],
)
def test_snippets_run(heading: str, saved: str, tmp_path: Path) -> None:
    assert run_ranks(2, run, heading, str(tmp_path)) == [1, 1]
    assert (tmp_path / saved).is_file()


def test_the_tests_that_the_table_names_exist() -> None:
    defined = {
        name for file in TESTS.glob("test_*.py") for name in re.findall(r"\ndef (test_\w+)", file.read_text())
    }
    named = re.findall(r"`(test_\w+)`", README)
    assert named
    assert set(named) <= defined
    frameworks = [row.split("|")[1].strip() for row in README.splitlines() if row.startswith("| ")][1:]
    for framework in frameworks:
        assert f"\n- {framework}: `test_" in README, f"{framework}: no tests are named"
