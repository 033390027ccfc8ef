"""Runs independent sections within a budget of time, and stores every result at once.

A section that raises is recorded, and the rest runs. ``gpu_check.json`` is rewritten with every
row and ``gpu_check.md`` after every section, so that a run that is killed loses at most the row in progress. A later
run on the same folder runs the sections that have no result yet.
"""

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPLETE = ("passed", "failed", "measured", "error")
"""Statuses of sections that a later run does not repeat. The others: "running" (killed meanwhile) and "left out"."""

EQUAL = "equal to the bit"
CELL = 240
"""Characters of a result in the Markdown table."""


class LeftOut(Exception):
    """A section, or a part of one, cannot run here; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The device that sections run on, and until when."""

    device: torch.device
    kernel: str  # of ShardedLamb: "triton" on a GPU
    deadline: float  # of time.monotonic(), seconds
    shapes: str = "tiny"  # the list that speed, memory and graphs are measured with

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal, which has tiny sizes."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


class Findings:
    """The rows of one section: measurements, and checks with a verdict."""

    def __init__(self, stored: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        """``stored`` is called with all rows after each one."""
        self.rows: dict[str, Any] = {}
        self.checks = 0
        self.failures: list[str] = []  # "row: what was found"
        self._stored = stored

    def note(self, name: str, value: Any) -> None:
        """A measurement, without a verdict."""
        self.rows[name] = value
        print(f"  {name}: {value}", flush=True)
        self._stored(self.rows)

    def check(self, name: str, holds: bool, found: object) -> None:
        """A verdict: whether what the package claims holds."""
        self.checks += 1
        if not holds:
            self.failures.append(f"{name}: {found}")
        self.note(name, {"verdict": "pass" if holds else "FAIL", "found": found})

    def equal(self, name: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Check that two lists of tensors have the same bits."""
        found = difference(ours, expected)
        self.check(name, found == EQUAL, found)

    def within(self, name: str, ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
        """Check the largest norm-wise relative difference; nan is not within any tolerance."""
        worst = relative_difference(ours, expected)
        self.check(name, worst <= tolerance, f"relative difference {worst:.1e}, at most {tolerance:.0e}")


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """`EQUAL`, or how many tensors and elements differ, and by how much at most."""
    if len(ours) != len(expected):
        return f"{len(ours)} tensors, expected {len(expected)}"
    pairs = [(a, b) for a, b in zip(ours, expected, strict=True) if not torch.equal(a, b)]
    if not pairs:
        return EQUAL
    if any(a.shape != b.shape for a, b in pairs):
        return "shapes differ"
    elements = sum(int((a != b).sum()) for a, b in pairs)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return f"{len(pairs)} of {len(ours)} tensors differ in {elements:,} elements, by at most {largest:.2e}"


def relative_difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max over tensors of ‖a - b‖ / ‖b‖, in fp64; nan if any is."""
    quotients = [
        (a.double() - b.double()).norm() / (b.double().norm() + 1e-30)
        for a, b in zip(ours, expected, strict=True)
    ]
    return float(torch.stack(quotients).max())


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the battery. ``run`` returns its result in one line of text."""

    name: str
    title: str
    needs_s: float  # left out if less of the budget is left, seconds
    run: Callable[[Setting, Findings], str]
    is_check: bool = True  # it has a verdict; False: it measures
    needs_gpu: bool = False


class Results:
    """The results of a folder, by section."""

    def __init__(self, folder: Path, device: str, about: Mapping[str, Any]) -> None:
        """
        Args:
            device: the device and the version of torch, which results of one folder have in common.
            about: command, date, machine and versions, for the JSON.

        Raises:
            ValueError: the folder holds results of another device or version.
        """
        self._json, self._markdown = folder / "gpu_check.json", folder / "gpu_check.md"
        self.content: dict[str, Any] = {"device": device, "about": about, "sections": {}}
        folder.mkdir(parents=True, exist_ok=True)
        if self._json.exists():
            self.content = json.loads(self._json.read_text(encoding="utf-8"))
            if self.content["device"] != device:
                raise ValueError(
                    f"--out {folder} holds results of {self.content['device']}, not of {device}; choose another folder"
                )

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """{name: {title, status, result, seconds, rows}}."""
        sections: dict[str, dict[str, Any]] = self.content["sections"]
        return sections

    def is_complete(self, name: str) -> bool:
        return self.sections.get(name, {}).get("status") in COMPLETE

    def store(self, section: Section, status: str, result: str, **more: Any) -> None:
        """Replace a section's entry and rewrite the JSON."""
        self.sections[section.name] = {
            "title": section.title,
            "is_check": section.is_check,
            "status": status,
            "result": result,
            **more,
        }
        _replace(self._json, json.dumps(self.content, indent=1, default=str) + "\n")

    def failed(self) -> list[str]:
        """Names of the checks that failed or raised."""
        return [
            name
            for name, entry in self.sections.items()
            if entry["is_check"] and entry["status"] in ("failed", "error")
        ]

    def publish(self, order: Sequence[str]) -> str:
        """Rewrite the Markdown table, a line a section in ``order``; returns it."""
        lines = [f"{self.content['device']}:", "", "| | result |", "|---|---|"]
        for name in order:
            entry = self.sections.get(name)
            if entry is not None:
                word = {"passed": "", "measured": ""}.get(entry["status"], f"**{entry['status']}**: ")
                result = f"{word}{_shortened(entry['result'])}"
                lines.append(f"| {entry['title']} | {result} |")
        text = "\n".join(lines) + "\n"
        _replace(self._markdown, text)
        return text


def run(sections: Sequence[Section], setting: Setting, results: Results, order: Sequence[str]) -> None:
    """Run every section that has no result yet, while the budget lasts.

    Stops where a section leaves a GPU that no longer answers (an illegal access ends the process' CUDA context): run
    again to resume after it.
    """
    began = time.monotonic()
    for section in sections:
        print(f"[{section.name}] at {time.monotonic() - began:.0f} s", flush=True)
        status = _run_one(section, setting, results)
        results.publish(order)
        entry = results.sections[section.name]
        print(f"  {status}: {entry['result']}", flush=True)
        if status == "error" and not _answers(setting):
            print("the GPU no longer answers; run the command again, which resumes after this section")
            return
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


def _run_one(section: Section, setting: Setting, results: Results) -> str:
    """Run a section and store its result; returns its status."""
    reason = _why_not(section, setting)
    if reason is not None:
        results.store(section, "left out", reason)
        return "left out"
    results.store(section, "running", "")
    found = Findings(lambda rows: results.store(section, "running", "", rows=rows))
    began = time.monotonic()
    try:
        result = section.run(setting, found)
        status = _status(section, found)
        if status == "failed":
            result = "; ".join(found.failures) or "nothing was checked"
    except LeftOut as left_out:
        status, result = "left out", str(left_out)
    except Exception as error:
        traceback.print_exc()
        status, result = "error", f"{type(error).__name__}: {error}"[:500]
    seconds = round(time.monotonic() - began, 1)
    results.store(section, status, result, seconds=seconds, rows=found.rows)
    return status


def _status(section: Section, found: Findings) -> str:
    if found.failures:
        return "failed"
    if not section.is_check:
        return "measured"
    return "passed" if found.checks else "failed"


def _why_not(section: Section, setting: Setting) -> str | None:
    if section.needs_gpu and not setting.on_gpu:
        return "needs a GPU"
    if setting.seconds_left < section.needs_s:
        return (
            f"{max(0.0, setting.seconds_left):.0f} s of the budget are left, it needs {section.needs_s:.0f} s"
        )
    return None


def _shortened(text: str) -> str:
    """One cell of a Markdown table; the JSON has the rest."""
    cell = text.replace("\n", " ").replace("|", "\\|")
    return cell if len(cell) <= CELL else f"{cell[:CELL]}…"


def _answers(setting: Setting) -> bool:
    try:
        setting.synchronize()
    except RuntimeError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one."""
    aside = path.with_suffix(path.suffix + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
