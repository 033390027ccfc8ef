"""Questions whose answers are spans of a context, and how SQuAD's JSON files are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_lamb.bert.finetune.tasks import OnBad, report_bad

_VERSIONS = {"SQuAD-1.1": "1.1", "SQuAD-2.0": "v2.0"}
"""Task → ``version`` in its files."""

SQUAD = {name: tuple(f"{split}-v{name[6:]}.json" for split in ("train", "dev")) for name in _VERSIONS}
"""Task → the names of its files as published (arXiv 1606.05250 and 1806.03822)."""


_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON may hold one alone."""


@dataclass(frozen=True)
class Question:
    """A question about a context."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]  # any of which is right; empty: the context has none
    start: int  # of the first answer in the context, in characters; 0 without answers


@dataclass(frozen=True)
class SpanSplit:
    """Questions, and the file that messages name."""

    source: str
    questions: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True)
class SpanDataset:
    """Two splits; ``has_unanswerable``: the rules of SQuAD 2.0 apply, where a context may lack the answer."""

    name: str
    has_unanswerable: bool
    train: SpanSplit
    dev: SpanSplit


def read_squad(name: str, train: Path, dev: Path, on_bad: OnBad = "error") -> SpanDataset:
    """The files of a task in `SQUAD`. ``on_bad``: whether bad questions are an error, or counted and left out.

    Raises:
        ValueError: a file is missing, is not JSON or is of another version or structure; questions are bad: no text,
            an empty context, an id seen before, no answers, an answer that is not at its answer_start.
    """
    splits = (_read(name, path, on_bad) for path in (train, dev))
    return SpanDataset(name, name == "SQuAD-2.0", *splits)


def _read(name: str, path: Path, on_bad: OnBad) -> SpanSplit:
    good: dict[str, Question] = {}
    bad, total = [], 0
    for place, context, entry in _entries(name, path):
        total += 1
        identity = entry.get("id")
        if not isinstance(identity, str):
            bad.append(f"{place}: id {identity!r}, expected a string")
            continue
        found = _question(identity, context, entry, may_lack=name == "SQuAD-2.0")
        if identity in good:
            found = f"{place} repeats its id"
        if isinstance(found, str):
            bad.append(f"question {identity!r}: {found}")
        else:
            good[identity] = found
    if bad:
        report_bad(f"{path}: {len(bad)} of {total} questions are bad", bad, on_bad)
    if not good:
        raise ValueError(f"{path}: no good question in {total}")
    return SpanSplit(str(path), tuple(good.values()))


def _entries(name: str, path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place in the file, context, question as it is there) of every question."""
    try:
        tree = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; task {name} needs a file to train and one of dev") from error
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != _VERSIONS[name]:
        raise ValueError(
            f"{path}: version {version!r}, expected {_VERSIONS[name]!r} for task {name}; tasks {list(_VERSIONS)} "
            f"have versions {list(_VERSIONS.values())}"
        )
    for i, article in enumerate(_field(path, "the file", tree, "data", list)):
        place = f"data[{i}]"
        for j, paragraph in enumerate(_field(path, place, article, "paragraphs", list)):
            place = f"data[{i}].paragraphs[{j}]"
            context = _field(path, place, paragraph, "context", str)
            for k, entry in enumerate(_field(path, place, paragraph, "qas", list)):
                if not isinstance(entry, dict):
                    raise ValueError(f"{path}: {place}.qas[{k}] is not an object")
                yield f"{place}.qas[{k}]", context, entry


def _field(path: Path, place: str, holder: Any, key: str, kind: type) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "a string"
        raise ValueError(f"{path}: {place} has no {key!r}, expected {expected}")
    return value


def _question(identity: str, context: str, entry: dict[str, Any], *, may_lack: bool) -> Question | str:
    """The question, or the reason why it is bad."""
    text, answers = entry.get("question"), entry.get("answers")
    is_impossible = entry.get("is_impossible", False)
    if not isinstance(text, str) or not text.strip():
        return f"question {text!r}, expected text"
    if not context.strip():
        return "its context is empty"
    if _SURROGATE.search(text + context):
        return "it or its context has half of a surrogate pair, which is no character"
    if not isinstance(answers, list):
        return f"answers {answers!r}, expected a list"
    if is_impossible is not False and not (may_lack and is_impossible is True):
        return f"is_impossible {is_impossible!r}, expected {'true or ' if may_lack else ''}false"
    if bool(answers) == is_impossible:
        return f"{len(answers)} answers and is_impossible {str(is_impossible).lower()}"
    for answer in answers:
        problem = _not_in(context, answer)
        if problem is not None:
            return problem
    start = answers[0]["answer_start"] if answers else 0
    return Question(identity, text, context, tuple(answer["text"] for answer in answers), start)


def _not_in(context: str, answer: Any) -> str | None:
    text, start = (
        (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
    )
    if not isinstance(text, str) or not text.strip() or type(start) is not int:
        return f"answer {answer!r}, expected a text and a number answer_start"
    there = context[start : start + len(text)] if start >= 0 else ""
    return None if there == text else f"answer {text!r} is not at {start}, where the context has {there!r}"
