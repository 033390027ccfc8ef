"""Spans: SQuAD's metrics and files, windows, the best span, and what a tiny model learns."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sharded_lamb.bert.__main__ import main
from sharded_lamb.bert.finetune import builtin, command, spans
from sharded_lamb.bert.finetune.encoder import Encoder
from sharded_lamb.bert.finetune.span_baselines import most_similar_sentences, random_words
from sharded_lamb.bert.finetune.span_scores import normalized, span_scores, word_f1
from sharded_lamb.bert.finetune.spans import SpanModel, Spans, best_answers, best_span
from sharded_lamb.bert.finetune.squad import SQUAD, Question, SpanDataset, SpanSplit, read_squad
from sharded_lamb.bert.finetune.tasks import Dataset, Split, Task
from sharded_lamb.bert.finetune.training import Settings, finetune
from sharded_lamb.bert.finetune.windows import Lengths, Windows
from tests.bert import squad_oracle
from tests.bert.conftest import LENGTH, paragraphs

CPU = torch.device("cpu")


# -- metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick-Brown fox!", "quickbrown fox"),
        ("an apple, a day; Theatre", "apple day theatre"),
        ("the", ""),
        ("U.S.", "us"),
        ("A.", ""),
        ("the-end", "theend"),  # punctuation goes first
        ("\u201cthe\u201d \t caf\u00e9\n", "\u201c \u201d caf\u00e9"),  # ASCII punctuation only
    ],
)
def test_texts_are_normalized_in_the_published_order(text: str, expected: str) -> None:
    assert normalized(text) == expected == squad_oracle.normalize_answer(text)


@pytest.mark.parametrize(
    ("predicted", "answer", "first", "second"),
    [
        ("the big red cat", "red cat sat", 2 / 3, 2 / 3),  # 2 shared of 3 and of 3
        ("cat cat", "cat", 2 / 3, 2 / 3),  # a word counts as often as both have it
        ("cat", "dog", 0, 0),
        ("the", "a", 0, 1),  # no word left: version 2 compares the lists
        ("", "", 0, 1),
        ("", "cat", 0, 0),
    ],
)
def test_f1_is_that_of_words(predicted: str, answer: str, first: float, second: float) -> None:
    assert word_f1(predicted, answer, has_unanswerable=False) == pytest.approx(first)
    assert word_f1(predicted, answer, has_unanswerable=True) == pytest.approx(second)


def test_scores_of_a_fixed_example() -> None:
    """F1 by hand: 1 (the second answer), 2/3 (one word of two), 0; without an answer 1, 0."""
    predicted = ["Paris", "Victor Hugo", "blue", "", "guess"]
    answers = [("City of Paris", "paris!"), ("Hugo",), ("red",), (), ()]
    assert span_scores(predicted, answers, has_unanswerable=True) == {
        "f1": pytest.approx((1 + 2 / 3 + 1) / 5),
        "exact": pytest.approx(2 / 5),
        "HasAns_f1": pytest.approx((1 + 2 / 3) / 3),
        "HasAns_exact": pytest.approx(1 / 3),
        "NoAns_exact": 1 / 2,
    }
    first = span_scores(predicted[:3], answers[:3], has_unanswerable=False)
    assert first == {"f1": pytest.approx((1 + 2 / 3) / 3), "exact": pytest.approx(1 / 3)}
    assert math.isnan(span_scores(["x"], [("x",)], has_unanswerable=True)["NoAns_exact"])


def random_texts(count: int, *, may_lack: bool) -> tuple[list[str], list[tuple[str, ...]]]:
    draw = np.random.default_rng(7)
    words = ["the", "a", "An", "Cat.", "cat", "dog", "\u00c9", "a-y", "!", "\u2014", " "]

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(0, 4)))

    predicted = [text() for _ in range(count)]
    return predicted, [
        tuple(text() for _ in range(draw.integers(0 if may_lack else 1, 4))) for _ in range(count)
    ]


def test_scores_are_those_of_the_published_scripts() -> None:
    predicted, answers = random_texts(400, may_lack=False)
    expected = squad_oracle.evaluate_version_1(predicted, answers)
    assert span_scores(predicted, answers, has_unanswerable=False) == pytest.approx(expected)
    predicted, answers = random_texts(400, may_lack=True)
    expected = squad_oracle.evaluate_version_2(predicted, answers)
    assert expected.pop("NoAns_f1") == expected["NoAns_exact"]
    assert span_scores(predicted, answers, has_unanswerable=True) == pytest.approx(expected)


def test_scores_are_those_of_torchmetrics() -> None:
    """It compares texts without a word as version 2 does, and leaves no answer out."""
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    predicted, answers = random_texts(200, may_lack=False)
    kept = [i for i, given in enumerate(answers) if all(normalized(text) for text in given)]
    predicted, answers = [predicted[i] for i in kept], [answers[i] for i in kept]
    expected = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predicted)],
        [
            {"answers": {"answer_start": [0] * len(given), "text": list(given)}, "id": str(i)}
            for i, given in enumerate(answers)
        ],
    )
    found = span_scores(predicted, answers, has_unanswerable=True)
    assert 100 * found["f1"] == pytest.approx(float(expected["f1"]), rel=1e-5)
    assert 100 * found["exact"] == pytest.approx(float(expected["exact_match"]), rel=1e-5)


# -- files --------------------------------------------------------------------------------------------

CONTEXT = "A list of strings is returned. Caf\u00e9 objects raise TypeError."


def entry(identity: str = "q1", answer: str | None = "strings", **other: Any) -> dict[str, Any]:
    """A question as published; without ``answer`` an impossible one of version 2."""
    answers = [] if answer is None else [{"text": answer, "answer_start": CONTEXT.find(answer)}]
    impossible = {"is_impossible": True, "plausible_answers": []} if answer is None else {}
    return {"id": identity, "question": "What is returned?", "answers": answers, **impossible, **other}


def squad_file(path: Path, *entries: dict[str, Any], version: str = "1.1", context: str = CONTEXT) -> Path:
    articles = [{"title": "T", "paragraphs": [{"context": context, "qas": list(entries)}]}]
    text = json.dumps({"version": version, "data": articles}, ensure_ascii=False)
    path.write_bytes(text.encode("utf-8-sig", "backslashreplace"))
    return path


def test_published_files_are_read(tmp_path: Path) -> None:
    several = [{"text": text, "answer_start": CONTEXT.index(text)} for text in ("strings", "list of strings")]
    train = squad_file(tmp_path / "train.json", entry("a"), entry("b", "Caf\u00e9"))
    dev = squad_file(tmp_path / "dev.json", entry("c", answers=several))
    dataset = read_squad("SQuAD-1.1", train, dev)
    assert not dataset.has_unanswerable
    asked = "What is returned?"
    assert dataset.train.questions == (
        Question("a", asked, CONTEXT, ("strings",), 10),
        Question("b", asked, CONTEXT, ("Caf\u00e9",), 31),
    )
    assert dataset.dev.questions == (Question("c", asked, CONTEXT, ("strings", "list of strings"), 10),)
    second = squad_file(
        tmp_path / "2.json", entry("a", is_impossible=False), entry("b", None), version="v2.0"
    )
    dataset = read_squad("SQuAD-2.0", second, second)
    assert dataset.has_unanswerable
    assert [question.answers for question in dataset.dev.questions] == [("strings",), ()]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("SQuAD-1.1", entry("b", "strings", answers=[]), "question 'b': 0 answers and is_impossible false"),
        ("SQuAD-1.1", entry("b", None), "question 'b': is_impossible True, expected false"),
        ("SQuAD-1.1", entry("a"), r"question 'a': data\[0\].paragraphs\[0\].qas\[1\] repeats its id"),
        ("SQuAD-1.1", entry(5), r"data\[0\].paragraphs\[0\].qas\[1\]: id 5, expected a string"),  # type: ignore[arg-type]
        ("SQuAD-1.1", entry("b", question=" "), "question 'b': question ' ', expected text"),
        (
            "SQuAD-1.1",
            entry("b", question="\ud83d?"),
            "question 'b': it or its context has half of a surrogate",
        ),
        ("SQuAD-1.1", entry("b", answers="x"), "question 'b': answers 'x', expected a list"),
        ("SQuAD-1.1", entry("b", answers=[{"text": "list"}]), "question 'b': answer .*, expected a text and"),
        (
            "SQuAD-1.1",
            entry("b", answers=[{"text": "list", "answer_start": 3}]),
            "question 'b': answer 'list' is not at 3, where the context has 'ist '",
        ),
        (
            "SQuAD-1.1",
            entry("b", answers=[{"text": "TypeError", "answer_start": -10}]),
            "question 'b': answer 'TypeError' is not at -10, where the context has ''",
        ),
        ("SQuAD-2.0", entry("b", is_impossible=True), "question 'b': 1 answers and is_impossible true"),
        (
            "SQuAD-2.0",
            entry("b", None, is_impossible=1),
            "question 'b': is_impossible 1, expected true or false",
        ),
    ],
)
def test_bad_questions_are_refused_by_name_or_left_out(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = "1.1" if name == "SQuAD-1.1" else "v2.0"
    file = squad_file(tmp_path / "x.json", entry("a"), wrong, version=version)
    with pytest.raises(ValueError, match=rf"x.json: 1 of 2 questions are bad:\n  {message}"):
        read_squad(name, file, file)
    dataset = read_squad(name, file, file, "skip")
    assert [question.id for question in dataset.train.questions] == ["a"]
    assert f"skipped: {file}: 1 of 2 questions are bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "x.json: no such file; task SQuAD-1.1 needs"),
        ("{", "x.json: not JSON in UTF-8"),
        ("[" * 100_000, "x.json: not JSON in UTF-8"),
        (b"\xff", "x.json: not JSON in UTF-8"),
        ("[]", "x.json: version None, expected '1.1'"),
        (
            '{"version": "v2.0", "data": []}',
            r"version 'v2.0', expected '1.1' for task SQuAD-1.1; tasks .*2.0",
        ),
        ('{"version": "1.1"}', "the file has no 'data', expected a list"),
        ('{"version": "1.1", "data": []}', "no good question in 0"),
        ('{"version": "1.1", "data": [1]}', r"data\[0\] has no 'paragraphs', expected a list"),
        ('{"version": "1.1", "data": [{"paragraphs": [{"qas": []}]}]}', r"paragraphs\[0\] has no 'context'"),
        ('{"version": "1.1", "data": [{"paragraphs": [{"context": "x"}]}]}', "has no 'qas', expected a list"),
        (
            '{"version": "1.1", "data": [{"paragraphs": [{"context": "x", "qas": [1]}]}]}',
            r"qas\[0\] is not an object",
        ),
        (
            '{"version": "1.1", "data": [{"paragraphs": [{"context": " ", "qas": [{"id": "i", "question": "q"}]}]}]}',
            "1 of 1 questions are bad:\n  question 'i': its context is empty",
        ),
    ],
)
def test_bad_files_are_refused_by_name(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_squad("SQuAD-1.1", file, file)


# -- windows ------------------------------------------------------------------------------------------

STRANGE = (
    "(The caf\u00e9 of Jos\u00e9) \u4e1c\u4eac cafe\u0301\u0301, \u0130stanbul; "
    "e\u0300 na\u00efve\u200b and\u00a0more [MASK] \U0001f600x. "
)


def split(*questions: Question) -> SpanSplit:
    return SpanSplit("questions", questions)


def asked(context: str, answer: str | None, text: str = "Which object?", identity: str = "id") -> Question:
    answers = () if answer is None else (answer,)
    return Question(identity, text, context, answers, 0 if answer is None else context.index(answer))


@pytest.mark.parametrize("pieces", [10, 21, 22, 60, 100])
def test_windows_are_those_of_hugging_face(pieces: int, encoder: Encoder) -> None:
    """Its stride is the overlap. 21 pieces fill the window; 22 need another."""
    tokenizer, text = encoder.tokenizer, "Which object?"
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    long = STRANGE + " ".join(paragraphs())
    context = long[: tokenizer(long, return_offsets_mapping=True, **plain)["offset_mapping"][pieces - 1][1]]
    room = 21
    length = room + 3 + len(tokenizer(text, **plain)["input_ids"])
    windows = Windows(split(asked(context, None, text)), tokenizer, Lengths(length, 6, 8), "error")
    expected = tokenizer(
        text,
        context,
        truncation="only_second",
        max_length=length,
        stride=room - 6,
        return_overflowing_tokens=True,
        split_special_tokens=True,
    )
    assert len(windows) == len(expected["input_ids"]) == len(squad_oracle.doc_spans(pieces, room, 6))
    for number in range(len(windows)):
        batch = windows.batch(np.array([number]))
        assert batch.tokens.tolist() == expected["input_ids"][number]
        assert batch.segments.tolist() == expected["token_type_ids"][number]


@pytest.mark.parametrize(("window", "stride"), [(28, 6), (28, 16), (300, 128)])
def test_pieces_have_most_context_in_one_window(window: int, stride: int, encoder: Encoder) -> None:
    """As in `run_squad.py`, whose score also has a hundredth of a window's length."""
    text = " ".join(paragraphs())[:4000]
    offsets = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for count in (*range(60, 72), 500, 613):
        lengths = Lengths(window, stride, 8)
        context = text[: offsets[count - 1][1]]
        windows = Windows(split(asked(context, None)), encoder.tokenizer, lengths, "error")
        places = squad_oracle.doc_spans(count, window - windows.context_begin(0) - 1, stride)
        assert len(places) == len(windows)
        for number, (start, length) in enumerate(places):
            expected = [squad_oracle.check_is_max_context(places, number, start + i) for i in range(length)]
            assert windows.has_most_context(number).tolist() == expected


@pytest.mark.parametrize(
    "word",
    [
        "Caf\u00e9",
        "cafe\u0301\u0301",
        "\u4e1c\u4eac",
        "na\u00efve",
        "\u0130stanbul",
        "e\u0300",
        "TypeError",
        "of  a list",
        "[MASK]",
    ],
)
def test_answers_are_found_in_pieces_and_back_in_characters(word: str, encoder: Encoder) -> None:
    """Where a window has all pieces of an answer, its text is the answer, accents included; elsewhere it is [CLS]."""
    filling, held = " ".join(paragraphs())[:150], []
    for before in (0, 60, 150):
        context = f"{filling[:before]} ({word}) {filling[before:]}"
        windows = Windows(split(asked(context, word)), encoder.tokenizer, Lengths(28, 6, 8), "error")
        begin, start = windows.context_begin(0), context.index(word)
        offsets = encoder.tokenizer(
            context, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
        )["offset_mapping"]
        own = [i for i, (a, b) in enumerate(offsets) if a < start + len(word) and b > start]
        targets = windows.targets(np.arange(len(windows))).tolist()
        places = squad_oracle.doc_spans(len(offsets), 28 - begin - 1, 6)
        for number, (first, length) in enumerate(places):
            inside = [begin + i - first for i in own if first <= i < first + length]
            assert targets[number] == ([inside[0], inside[-1]] if len(inside) == len(own) else [0, 0])
            held.append(len(inside) == len(own))
            if held[-1]:
                assert windows.text(number, inside[0] - begin, inside[-1] - begin) == word
    assert {True, False} == {*held}


def test_an_answer_inside_a_word_has_its_pieces(encoder: Encoder) -> None:
    for context, answer in (("on 1895-1943", "1895"), ("TypeErrors", "Type"), ("xTypeError", "r")):
        windows = Windows(split(asked(context, answer)), encoder.tokenizer, Lengths(28, 6, 8), "error")
        first, last = windows.targets(np.array([0]))[0] - windows.context_begin(0)
        assert answer in windows.text(0, int(first), int(last))
        for shorter in ((first + 1, last), (first, last - 1)):
            assert shorter[0] > shorter[1] or answer not in windows.text(0, *map(int, shorter))


def test_windows_refuse_what_they_cannot_hold(encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    good = asked("a list", "list")
    bad = {
        "long": asked("a list", "list", "list " * 9, "long"),
        "blank": asked("a list", "list", "\u200b", "blank"),
        "hidden": asked("\u200b\u200b", None, identity="hidden"),
        "nothing": asked("a \u200b list", "\u200b", identity="nothing"),
    }
    lengths = Lengths(28, 6, 8)
    messages = {
        "long": "9 pieces, expected 1 to the 8 of --max-question",
        "blank": "0 pieces, expected 1 to the 8",
        "hidden": "its context has no pieces",
        "nothing": "answer '\\u200b' has no pieces",
    }
    for name, question in bad.items():
        with pytest.raises(
            ValueError, match=f"questions: 1 of 2 questions are bad:\n  question '{name}'"
        ) as e:
            Windows(split(good, question), encoder.tokenizer, lengths, "error")
        assert messages[name] in str(e.value)
    windows = Windows(split(bad["long"], good), encoder.tokenizer, lengths, "skip")
    assert windows.questions == (good,)
    assert "skipped: questions: 1 of 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no good question in 1"):
        Windows(split(bad["long"]), encoder.tokenizer, lengths, "skip")
    with pytest.raises(ValueError, match=r"--stride 18, --max-question 8: .* at most the 17 pieces"):
        Lengths(28, 18, 8)
    Lengths(28, 17, 8)


# -- the best span ------------------------------------------------------------------------------------


def test_the_best_span_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    monkeypatch.setattr(spans, "LONGEST_ANSWER", 4)
    for n in (1, 2, 3, 9, 9, 9):
        first, last = draw.normal(size=(2, n)).astype(np.float32)
        may_begin = draw.random(n) < 0.7
        allowed = [(i, j) for i in range(n) for j in range(i, min(n, i + 4)) if may_begin[i]]
        score, begin, end = best_span(first, last, may_begin)
        if allowed:
            assert (begin, end) == max(allowed, key=lambda place: first[place[0]] + last[place[1]])
            assert score == pytest.approx(float(first[begin] + last[end]))
        else:
            assert score == -math.inf
    monkeypatch.undo()
    score, begin, end = best_span(
        *np.eye(2, 40, dtype=np.float32)[:, [0, *range(2, 40), 1]], np.ones(40, bool)
    )
    assert (score, end - begin <= 29) == (1, True)  # 40 pieces are too many


def test_an_answer_is_the_best_over_windows(encoder: Encoder) -> None:
    """Logits by hand: a good span in the second window, a better one where it has less context, and no answer."""
    context = "list object string class function method module name type value " * 2
    questions = split(asked(context, None), asked("list object", None))
    windows = Windows(questions, encoder.tokenizer, Lengths(20, 5, 8), "error")
    count = len(windows) - 1
    assert count >= 2
    logits = [
        np.zeros((len(windows.batch(np.array([number])).tokens), 2), np.float32)
        for number in range(count + 1)
    ]
    most = windows.has_most_context(1)
    begin, chosen = windows.context_begin(1), int(np.flatnonzero(most)[0])
    logits[1][begin + chosen, 0] = logits[1][begin + chosen + 1, 1] = 2
    other = int(np.flatnonzero(~most)[0])
    logits[1][begin + other, 0] = 9
    logits[count][0] = 3.5  # no answer by 7 - 0
    logits[0][0], logits[1][0] = (2.0, 2.25), (9, 9)  # the least of the windows counts: 4.25 - 4
    for extra in range(2, count):
        logits[extra][0] = 9
    expected = windows.text(1, chosen, chosen + 1)
    assert len(expected.split()) == 2
    assert best_answers(windows, logits, 0.5) == [expected, ""]
    assert best_answers(windows, logits, 0.25) == [expected, ""]  # exceeds, not reaches
    assert best_answers(windows, logits, 0.0) == ["", ""]
    assert best_answers(windows, logits, math.inf)[0] == expected
    assert best_answers(windows, logits, math.inf)[1] in ("list", "object", "list object")


# -- the model ----------------------------------------------------------------------------------------


def toy(count: int, seed: int, *, may_lack: bool = False) -> SpanSplit:
    """Contexts of 30 words of which one, anywhere, is the answer, or none."""
    draw = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        words = draw.choice(["the", "of", "a", "string", "list"], 30).tolist()
        lacks = may_lack and draw.random() < 0.4
        if not lacks:
            words[int(draw.integers(30))] = "object"
        questions.append(asked(" ".join(words), None if lacks else "object", identity=str(number)))
    return split(*questions)


def toy_spans(encoder: Encoder, *, may_lack: bool) -> Spans:
    dataset = SpanDataset("toy", may_lack, toy(96, 1, may_lack=may_lack), toy(40, 2, may_lack=may_lack))
    return Spans(dataset, encoder.tokenizer, Lengths(24, 8, 4))


def test_outputs_and_loss_are_those_of_hugging_face_over_padded_rows(encoder: Encoder) -> None:
    from transformers import BertForQuestionAnswering

    problem = toy_spans(encoder, may_lack=False)
    model = SpanModel(encoder, seed=4).eval()
    reference = BertForQuestionAnswering(model.module.config).eval()
    reference.load_state_dict(model.module.state_dict(), strict=False)
    numbers = np.array([0, 5, 2, 7])
    dataset = toy(96, 1)
    windows = Windows(dataset, encoder.tokenizer, Lengths(24, 8, 4), "error")
    batch = windows.batch(numbers)
    assert batch.follows is not None
    assert len(set(batch.documents.offsets.diff().tolist())) > 1
    losses, begin = [], 0
    with torch.no_grad():
        flat = model(batch)
        for number, length in zip(
            batch.follows.tolist(), batch.documents.offsets.diff().tolist(), strict=True
        ):
            part = slice(begin, begin + length)
            rows = reference(input_ids=batch.tokens[None, part], token_type_ids=batch.segments[None, part])
            expected = torch.stack([rows.start_logits[0], rows.end_logits[0]], 1)
            torch.testing.assert_close(flat[part], expected, rtol=1e-5, atol=1e-6)
            target = torch.from_numpy(windows.targets(np.array([number]))[0])
            losses += [F.cross_entropy(expected[:, i][None], target[i][None]) for i in (0, 1)]
            begin += length
        torch.testing.assert_close(problem.loss(model, numbers, CPU), torch.stack(losses).mean())


def test_weights_are_the_encoder_s_but_for_its_pooler(encoder: Encoder) -> None:
    from transformers import BertModel

    values = {name: p.detach() + 1 for name, p in BertModel(encoder.config).named_parameters()}
    assert any(name.startswith("pooler.") for name in values)
    own = dict(SpanModel(replace(encoder, weights=values), seed=0).module.bert.named_parameters())
    assert own.keys() == {name for name in values if not name.startswith("pooler.")}
    for name, p in own.items():
        assert torch.equal(p, values[name])
    with pytest.raises(KeyError, match="other"):
        SpanModel(replace(encoder, weights={"other": values["pooler.dense.bias"]}), seed=0)


@pytest.mark.parametrize("may_lack", [False, True])
def test_a_tiny_model_learns_spans(may_lack: bool, encoder: Encoder) -> None:
    """Over windows; a window without the answer teaches [CLS]."""
    torch.set_num_threads(1)
    problem = toy_spans(encoder, may_lack=may_lack)
    assert problem.count > 96
    found = finetune(encoder, problem, Settings("adamw", 6, 16, 0.1), 5e-3, 0, CPU)
    assert found["f1"] >= 0.9
    assert {*problem.metrics, "loss"} == {*found}
    if may_lack:
        assert found["NoAns_exact"] >= 0.8
        assert found["HasAns_exact"] >= 0.8


def test_outputs_that_are_not_finite_have_no_score(encoder: Encoder) -> None:
    problem = toy_spans(encoder, may_lack=False)
    model = problem.model(encoder, 0).eval()
    with torch.no_grad():
        model.module.qa_outputs.bias.fill_(math.inf)
    assert all(math.isnan(value) for value in problem.scores(model, CPU).values())


def test_baselines_choose_words_and_sentences() -> None:
    context = "A list is here. The object raises TypeError! Nothing else."
    questions = [asked(context, "TypeError", "What does the object raise?")]
    assert most_similar_sentences(questions) == ["The object raises TypeError!"]
    drawn = random_words([asked(context, "TypeError! Nothing")], questions * 50)
    places = {context.index(text) for text in drawn}
    assert {len(text.split()) for text in drawn} == {2}
    assert len(places) == len(context.split()) - 1  # every place comes up


# -- the command --------------------------------------------------------------------------------------


def test_the_builtin_spans_have_one_answer_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    filling = " word" * 25
    named = [
        "raises ValueError",
        "of 12 bytes",
        "calls run() first",
        "an ASCII text",
        "TypeError or KeyError",
    ]
    documents = tuple("\n\n".join(f"{d} {one}{filling}" for one in named) for d in "abcdefghijklmnopqrst")
    monkeypatch.setattr(builtin, "builtin_documents", lambda: documents)
    dataset = builtin.builtin_spans()
    kinds = {"exception": "ValueError", "number": "12", "function": "run()", "capitals": "ASCII"}
    seen = []
    for part in (dataset.train, dataset.dev):
        for question in part.questions:
            kind = next(kind for kind in kinds if kind in question.text)
            assert question.answers == ((kinds[kind],) if kinds[kind] in question.context else ())
            assert question.context[question.start :].startswith(question.answers or "")
            assert "KeyError" not in question.context  # two exceptions: no question
        seen.append({question.context[0] for question in part.questions})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == len(documents)
    answered = [bool(q.answers) for part in (dataset.train, dataset.dev) for q in part.questions]
    assert answered.count(True) == 4 * len(documents)
    assert 0.2 < answered.count(False) / len(answered) < 0.45


def test_the_longest_default_is_the_model_s(run_folder: Path, tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\na list\t1\nno list\t0\n")
    arguments = ["--from", str(run_folder), "--task", "SST-2", "--data", str(tmp_path), "--epochs", "1"]
    assert main(["finetune", *arguments, "--seeds", "0", "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["task"]["max_length"] == LENGTH


def test_the_builtin_tasks_are_short_by_default(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    texts = (("a list",), ("no list",)) * 4
    pairs = Split(texts, np.arange(8) % 2)
    task = Task("toy", ("text",), "label", ("accuracy",), ("0", "1"))
    monkeypatch.setattr(command, "builtin_dataset", lambda: Dataset(task, pairs, pairs))
    few = SpanDataset("toy", True, toy(8, 1, may_lack=True), toy(8, 2, may_lack=True))
    monkeypatch.setattr(command, "builtin_spans", lambda: few)
    out = tmp_path / "out.json"
    for arguments, lr in (([], 3e-4), (["--task", "builtin-spans"], 3e-3)):
        assert main(["finetune", "--from", str(run_folder), "--out", str(out), *arguments]) == 0
        result = json.loads(out.read_text())
        settings = {name: result["settings"][name] for name in ("epochs", "lrs", "seeds")}
        assert settings == {"epochs": 2, "lrs": [lr], "seeds": [0]}
        assert [row["weights"] for row in result["runs"]] == ["trained", "random"]


def test_the_tables_are_the_measured_ones() -> None:
    folder = Path(spans.__file__).parents[1]
    text = (folder / "README.md").read_text()
    names = {"trained": "quickstart's weights", "random": "the same model, random weights"}
    for task in ("builtin", "builtin-spans"):
        result = json.loads((folder / "results" / f"finetune-{task}.json").read_text())
        rows = result["best"]
        for kind, name in names.items():
            values = [rows[kind][metric] for metric in result["task"]["metrics"]]
            shown = [f"{value:.3f}" for value in values]
            if task == "builtin":
                shown = [f"{100 * values[0] + 1e-9:.1f} %", f"{values[1]:.3f}" if values[1] else "0"]
            assert f"| {name} | {' | '.join(shown)} |" in text
        most = result["baselines"].get("no answer", result["baselines"].get("bag of words"))
        first = most[result["task"]["metrics"][0]]
        assert (
            f"| no answer | {first:.3f} |" if task == "builtin-spans" else f"| {100 * first + 1e-9:.1f} % |"
        ) in text


def write_toy(folder: Path, name: str) -> None:
    version = "1.1" if name == "SQuAD-1.1" else "v2.0"
    for file, part in zip(SQUAD[name], (toy(24, 5), toy(12, 6)), strict=True):
        paragraphs = [
            {
                "context": q.context,
                "qas": [
                    {
                        "id": q.id,
                        "question": q.text,
                        "answers": [{"text": q.answers[0], "answer_start": q.start}],
                    }
                ],
            }
            for q in part.questions
        ]
        (folder / file).write_text(json.dumps({"version": version, "data": [{"paragraphs": paragraphs}]}))


@pytest.mark.parametrize(("name", "epochs", "batch"), [("SQuAD-1.1", 3, 32), ("SQuAD-2.0", 2, 48)])
def test_published_settings_are_the_defaults(
    name: str,
    epochs: int,
    batch: int,
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    write_toy(tmp_path, name)
    out = tmp_path / "out.json"
    arguments = ["--from", str(run_folder), "--task", name, "--data", str(tmp_path), "--out", str(out)]
    assert main(["finetune", *arguments]) == 0
    result = json.loads(out.read_text())
    assert result["settings"] == {
        "optimizer": "adamw",
        "epochs": epochs,
        "batch": batch,
        "warmup": 0.1,
        "lrs": [5e-5],
        "seeds": [0, 1, 2],
    }
    assert result["task"]["lengths"] == {"window": 32, "stride": 32 // 3, "question": 32 // 6}
    assert (result["task"]["train"], result["task"]["dev"]) == (24, 12)
    assert [(row["weights"], row["seed"]) for row in result["runs"]] == [("trained", s) for s in range(3)]
    shown = capsys.readouterr().out
    for row in ("random words", "most similar sentence", "trained weights"):
        assert f"| {row} |" in shown
    assert ("| no answer |" in shown) == (name == "SQuAD-2.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "SQuAD-1.1"], "no train split: give --data FOLDER or --train FILE"),
        (["--task", "SQuAD-1.1", "--data", "{data}", "--label", "y"], "SQuAD-1.1 takes no --label"),
        (["--task", "SQuAD-1.1", "--null-threshold", "1"], "SQuAD-1.1 takes no --null-threshold"),
        (["--task", "RTE", "--stride", "3", "--max-question", "4"], "RTE takes no --stride, --max-question"),
        (["--task", "builtin-spans", "--data", "x"], "builtin-spans takes no --data"),
        (["--task", "SQuAD-1.1", "--data", "{data}", "--stride", "25"], "at most the 24 pieces"),
        (["--task", "SQuAD-1.1", "--data", "{data}", "--max-length", "33"], "to the model's 32"),
        (["--task", "SQuAD-1.1", "--data", "{data}", "--max-question", "2"], "of --max-question"),
        (["--task", "SQuAD-2.0", "--data", "{data}"], "train-v2.0.json: no such file"),
        (["--task", "builtin-spans", "--null-threshold", "nan"], "--null-threshold nan: expected a finite"),
    ],
)
def test_bad_arguments_are_errors_in_one_line(
    arguments: list[str], message: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy(tmp_path, "SQuAD-1.1")
    filled = [a.format(data=tmp_path) for a in arguments]
    assert main(["finetune", "--from", str(run_folder), *filled]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
