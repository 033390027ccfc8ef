"""`sharded-lamb doctor` states facts; what is missing is one."""

import json
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb.__main__ import main
from sharded_lamb.kernels import choice
from sharded_lamb.preflight import doctor


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_facts_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(capsys)
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["torch.distributed"]["gloo"] == "yes"
    assert facts["kernels"]["on cpu"] == "cpp"
    assert Path(facts["kernels"]["library"]).stem.startswith("lamb-")
    assert "lo (" in facts["machine"]["interfaces"]
    assert facts["extras"]["bert"] == "complete"


def test_text_shows_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(capsys)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for section, of_section in facts.items():
        assert section in lines
        for name, fact in of_section.items():
            if "free" not in fact:  # changes meanwhile
                assert any(line.split() == f"{name} {fact}".split() for line in lines)
    assert len(lines) < 50


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("tqdm", "yaml") else real(name, *rest)

    monkeypatch.setattr(doctor, "find_spec", without)
    monkeypatch.setattr(choice, "_why_no_cpp", lambda: "the disk is full")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "_text", lambda path, whole=False: "" if whole else "unknown")
    facts = report(capsys)
    assert facts["extras"]["bert"] == "missing: tqdm, yaml"
    assert facts["kernels"]["on cpu"] == "torch"
    assert facts["kernels"]["cpp on cpu"] == "no: the disk is full"
    assert "library" not in facts["kernels"]
    assert "no C++ compiler was found (CXX=no-such-compiler)" in facts["kernels"]["compiler"]
    assert facts["machine"]["huge pages"] == "unknown"
