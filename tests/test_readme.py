"""Runs and checks every README: snippets, options, variants, commands, links."""

import inspect
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_lamb import VARIANTS, ShardedLamb
from sharded_lamb.__main__ import main
from sharded_lamb.core.hyperparams import DEFAULTS
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("sharded_lamb/*/README.md"))
PAGES = sorted(path for path in ROOT.glob("sharded_lamb/**/*.md") if path.name != "README.md")
READMES = [
    *(ROOT / "README.md", ROOT / "launch" / "README.md"),
    *(folder / "README.md" for folder in FOLDERS),
    *sorted(ROOT.glob("sharded_lamb/recipes/*/README.md")),
]


def readme(folder: str = "") -> str:
    """The README of a folder of the package, by default the project's."""
    return (ROOT / "sharded_lamb" / folder / "README.md" if folder else ROOT / "README.md").read_text()


def snippets(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def table_rows(header: str) -> list[str]:
    table = readme("optim").split(header, 1)[1].split("\n\n", 1)[0]
    return [
        name for row in table.splitlines()[2:] for name in re.findall(r"`\"?(\w+)\"?`", row.split("|")[1])
    ]


def run_snippets(rank: int, text: str, folder: Path) -> list[str]:
    """The files that the snippets wrote."""
    os.chdir(folder)
    space: dict[str, Any] = {}
    try:
        for snippet in snippets("python", text):
            # The harness has already initialized the process group.
            code = snippet.replace("dist.init_process_group()", "pass")
            exec(compile(code, "README.md", "exec"), space)
    finally:
        os.chdir(ROOT)
    if "optimizer" in space:
        assert space["optimizer"].memory()["moments"] > 0
        space["optimizer"].close()
    return sorted(path.name for path in folder.rglob("*") if path.name == "latest")


# Integrations' snippets are files, which tests/integrations run.
@pytest.mark.parametrize("folder", ["", "optim", "checkpoint", "watchdog", "kernels"])
def test_python_snippets_run_on_two_ranks(folder: str, tmp_path: Path) -> None:
    assert len(snippets("python", readme(folder))) == (2 if folder == "optim" else 1)
    for written in run_ranks(2, run_snippets, readme(folder), tmp_path):
        assert written == (["latest"] if folder == "checkpoint" else [])


def test_the_snippet_on_divergence_runs_on_two_ranks(tmp_path: Path) -> None:
    text = (ROOT / "sharded_lamb/optim/diverges.md").read_text()
    assert len(snippets("python", text)) == 1
    run_ranks(2, run_snippets, text, tmp_path)


def test_every_snippet_of_a_folder_is_run() -> None:
    assert [path.name for path in PAGES if "```python" in path.read_text()] == ["diverges.md"]
    others = {"optim", "checkpoint", "watchdog", "kernels", "integrations"}
    assert not [path.name for path in FOLDERS if path.name not in others and "```python" in readme(path.name)]


def test_the_readme_is_short() -> None:
    assert len(readme().splitlines()) <= 150


@pytest.mark.parametrize("path", READMES + PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)", path.read_text()):
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings]
            assert heading in slugs, target


def test_options_and_variants_are_the_real_ones() -> None:
    assert table_rows("| option | default | meaning |") == ["variant", *DEFAULTS]
    assert sorted(table_rows("| variant | source |")) == sorted(VARIANTS)


def test_help_names_every_rule_option() -> None:
    for option in DEFAULTS:
        assert re.search(rf"\b{option}\b", ShardedLamb.__doc__ or ""), option


def test_members_named_for_sharded_lamb_exist() -> None:
    line = readme("optim").split("Only on `ShardedLamb`:", 1)[1].split("`help(", 1)[0]
    keywords, members = line.split("methods", 1)
    for name in re.findall(r"`(\w+)[=(`]", keywords):
        assert name in inspect.signature(ShardedLamb.__init__).parameters, name
    for name in re.findall(r"`(\w+)[(`]", members):
        assert hasattr(ShardedLamb, name), name


def from_diff(which: str) -> dict[str, Any]:
    """The ds_config of the README's diff, before ("-") or after ("+")."""
    (diff,) = snippets("diff", readme("deepspeed"))
    body = diff.split("ds_config.json\n", 1)[1]
    lines = [line[1:] for line in body.splitlines() if line[:1] in (" ", which)]
    config: dict[str, Any] = json.loads(
        "{" + re.sub(r",\s*$", "", re.sub(r",(\s*\n\s*})", r"\1", "\n".join(lines))) + "}"
    )
    return config


def run_deepspeed_configs(rank: int, configs: list[dict[str, Any]]) -> list[str]:
    from sharded_lamb.deepspeed import initialize

    names = []
    for take_over, config in zip((True, False), configs, strict=True):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        model = torch.nn.ModuleDict({"LayerNorm": model}) if not take_over else model
        full = {**config, "train_micro_batch_size_per_gpu": 1}
        engine, *_ = initialize(None, model, config=full, take_over_lamb=take_over)
        names.append(type(engine.basic_optimizer).__name__)
    return names


def test_deepspeed_configs_before_and_after() -> None:
    before, after = from_diff("-"), from_diff("+")
    assert before["optimizer"]["type"] == "Lamb"
    assert run_ranks(1, run_deepspeed_configs, [before, after], timeout=300) == [["DeepSpeedLamb"] * 2]


def test_the_table_of_naive_ratios_is_the_measured_one() -> None:
    from sharded_lamb.bench.naive_ratios import table as naive_table

    measured = json.loads((ROOT / "sharded_lamb/bench/results/naive-ratios-2.json").read_text())
    expected = naive_table(measured["ratio over exact ratio"]).splitlines()[2:]
    assert all(row in readme("deepspeed") for row in expected)
    assert len(expected) == 6


@pytest.mark.parametrize("command", re.findall(r"^launch/\S+", readme() + readme("bert"), flags=re.MULTILINE))
def test_commands_exist(command: str) -> None:
    assert (ROOT / command).stat().st_mode & 0o111, f"{command} is not executable"


@pytest.mark.parametrize(
    "line", re.findall(r"^torchrun .*-m sharded_lamb (verify.*)$", readme(), flags=re.MULTILINE)
)
def test_verify_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse exits with 2 on an unknown option; --help after valid ones exits with 0."""
    arguments = shlex.split(line, comments=True)
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--help"])
    assert exit_info.value.code == 0, capsys.readouterr().err
