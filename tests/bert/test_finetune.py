"""Fine-tuning: metrics, GLUE's files and their faults, where weights come from, and what a tiny model learns."""

import json
import math
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sharded_lamb.bert.__main__ import main
from sharded_lamb.bert.finetune import builtin
from sharded_lamb.bert.finetune.bag_of_words import bag_of_words, majority
from sharded_lamb.bert.finetune.encoder import Encoder, read_encoder
from sharded_lamb.bert.finetune.scores import METRICS, scores
from sharded_lamb.bert.finetune.sentences import Classifier, Examples, Sentences, longest_first
from sharded_lamb.bert.finetune.tasks import GLUE, Dataset, Split, Task, read
from sharded_lamb.bert.finetune.training import Settings, finetune

CPU = torch.device("cpu")


# -- metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "predicted", "target", "expected"),
    [
        ("accuracy", [1, 1, 1, 0], [1, 0, 0, 0], 1 / 2),
        ("f1", [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1], 2 / 5),  # precision 1/3, recall 1/2
        ("f1", [0, 0], [0, 0], 0),
        ("matthews", [1, 1, 1, 0], [1, 0, 0, 0], 1 / 3),
        ("matthews", [1, 1], [1, 0], 0),
        ("pearson", [1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ("pearson", [0.1, 0.1, 0.1], [1, 2, 3], math.nan),  # whose rounded variance is not 0
        ("spearman", [1, 2, 2, 30], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_metrics_are_their_definitions(
    metric: str, predicted: list[float], target: list[float], expected: float
) -> None:
    assert METRICS[metric](np.array(predicted), np.array(target)) == pytest.approx(expected, nan_ok=True)


def test_correlations_are_those_of_pandas() -> None:
    draw = np.random.default_rng(1)
    x = np.round(draw.normal(size=50), 1)  # with ties
    y = np.round(x + draw.normal(size=50), 1)
    pair = pd.DataFrame({"x": x, "y": y})
    for metric in ("pearson", "spearman"):
        assert METRICS[metric](x, y) == pytest.approx(pair.corr(metric).loc["x", "y"], abs=1e-12)
    both = (x > 0.3).astype(int), (y > 0).astype(int)
    phi = np.corrcoef(*both)[0, 1]  # the definition for two classes
    assert METRICS["matthews"](*both) == pytest.approx(phi, abs=1e-12)


def test_outputs_that_are_not_finite_have_no_score() -> None:
    bad = scores(["accuracy"], np.array([[math.nan, 0.0], [0.0, 1.0]]), np.array([0, 1]))
    assert math.isnan(bad["accuracy"])


# -- files --------------------------------------------------------------------------------------------

HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
"""As published; CoLA's files have none."""
TEXTS = {"sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String"}
LABELS = {"is_duplicate", "label", "gold_label", "Quality", "score"}


def published(name: str, label: str) -> list[str]:
    if name == "CoLA":
        return ["gj04", label, "*" if label == "0" else "", 'He said "no.']
    columns = HEADERS[name].removeprefix("\ufeff").split("\t")
    return [label if c in LABELS else f'the {c} "x' if c in TEXTS else f"[{c}]" for c in columns]


@pytest.mark.parametrize("name", GLUE)
def test_published_files_are_read(name: str, tmp_path: Path) -> None:
    task, folder = GLUE[name], tmp_path
    labels = ["2.5", "0.0"] if task.is_regression else list(task.labels)
    lines = ["\t".join(published(name, label)) for label in labels]
    text = "\r\n".join([*([HEADERS[name]] if name in HEADERS else []), *lines, ""])
    for file in ("train.tsv", task.dev):
        (folder / file).write_bytes(text.encode())
    dataset = read(task, folder / "train.tsv", folder / task.dev)
    assert dataset.outputs == (1 if task.is_regression else len(labels))
    assert dataset.train.targets.tolist() == ([2.5, 0.0] if task.is_regression else list(range(len(labels))))
    expected = ('He said "no.',) if name == "CoLA" else tuple(f'the {c} "x' for c in task.texts)
    assert dataset.dev.texts == (expected,) * len(labels)


GOOD = "sentence\tlabel\na film\t1\nno film\t0\n"


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (None, GOOD, "train.tsv: no such file"),
        (GOOD, None, "dev.tsv: no such file"),
        (GOOD, "", "dev.tsv: no examples"),
        ("sentence\tlabel\n", GOOD, "train.tsv: no examples in 1 lines"),
        ("text\tlabel\na\t1\n", GOOD, r"train.tsv: no column \['sentence'\].*\['text', 'label'\]"),
        ("sentence\na\n", GOOD, r"no column \['label'\]"),
        (
            GOOD + "good\t2\n",
            GOOD,
            r"train.tsv: 1 of 3 rows are bad:\n  line 4: label '2', expected one of \['0'",
        ),
        (GOOD + "\t1\n \t0\n", GOOD, "2 of 4 rows are bad:\n  line 4: column 'sentence' is empty\n  line 5"),
        (GOOD, GOOD + "a\tb\t1\n", "dev.tsv: 1 of 3 rows are bad:\n  line 4: 3 columns, expected 2"),
        (GOOD + "\nx\t1\n", GOOD, "line 4: 1 columns, expected 2"),
        (GOOD + "x\n" * 12, GOOD, "12 of 14 rows are bad(.*\n){10}.*line 13: .*\n  and 2 more"),
        (GOOD, "sentence\tlabel\na\t1\n", r"train.tsv has 2 labels \['0', '1'\] and .*dev.tsv has 1 \['1'\]"),
        (
            "sentence\tlabel\na\t1\n",
            "sentence\tlabel\na\t1\n",
            "expected at least two in both, and none in dev that the other lacks",
        ),
    ],
)
def test_bad_files_are_refused_by_name(
    train: str | None, dev: str | None, message: str, tmp_path: Path
) -> None:
    files = {"train.tsv": train, "dev.tsv": dev}
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(GLUE["SST-2"], tmp_path / "train.tsv", tmp_path / "dev.tsv")


def test_a_label_that_dev_lacks_is_no_fault(tmp_path: Path) -> None:
    task = replace(GLUE["SST-2"], labels=("a", "b", "c"))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nx\ta\ny\tb\nz\tc\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nx\ta\ny\tc\n")
    dataset = read(task, tmp_path / "train.tsv", tmp_path / "dev.tsv")
    assert (dataset.outputs, dataset.dev.targets.tolist()) == (3, [0, 2])


def test_other_faults_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.tsv"
    file.write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read(GLUE["SST-2"], file, file)
    file.write_text(HEADERS["STS-B"] + "\n" + "\t".join(published("STS-B", "inf")) + "\n")
    with pytest.raises(ValueError, match="line 2: score 'inf', expected a finite number"):
        read(GLUE["STS-B"], file, file)
    with pytest.raises(ValueError, match="no good row in 1"):
        read(GLUE["STS-B"], file, file, "skip")
    file.write_text(GOOD + "ragged\nbad\t9\n")
    dataset = read(GLUE["SST-2"], file, file, "skip")
    assert dataset.train.texts == (("a film",), ("no film",))
    assert f"skipped: {file}: 2 of 4 rows are bad" in capsys.readouterr().out


def test_labels_of_own_files_are_found(tmp_path: Path) -> None:
    file, other = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    file.write_text("a\tyes\nb\tno\n")
    dataset = read(Task("files", ("0",), "1", ("accuracy",)), file, file)
    assert dataset.task.labels == ("no", "yes")
    assert dataset.task.metrics == ("accuracy", "f1", "matthews")
    assert dataset.train.targets.tolist() == [1, 0]
    other.write_text("a\tyes\nb\tnever\n")
    with pytest.raises(
        ValueError, match=r"dev.tsv: 1 of 2 .*\n  line 2: 1 'never', expected one of \['no', 'yes'\]"
    ):
        read(Task("files", ("0",), "1", ("accuracy",)), file, other)
    with pytest.raises(ValueError, match="expected names, or numbers"):
        Task("files", ("sentence",), "1", ("accuracy",))
    with pytest.raises(ValueError, match="expected one or two of text"):
        Task("files", ("a", "b", "c"), "label", ("accuracy",))


def test_the_builtin_task_splits_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are d.p.w: document, paragraph, number; a paragraph of 70 words has two pairs."""
    documents = tuple(
        "\n\n".join(" ".join(f"{d}.{p}.{w}" for w in range(70)) for p in range(3)) for d in range(60)
    )
    monkeypatch.setattr(builtin, "builtin_documents", lambda: documents)
    dataset = builtin.builtin_dataset()
    seen = []
    for split in (dataset.train, dataset.dev):
        sources = set()
        for (first, second), target in zip(split.texts, split.targets.tolist(), strict=True):
            a, b = ([tuple(map(int, word.split("."))) for word in text.split()] for text in (first, second))
            assert len(a) == len(b) == builtin.WORDS
            assert a[0][2] in (0, 32)
            follows = a[-1][:2] == b[0][:2] and b[0][2] == a[-1][2] + 1
            assert follows == bool(target)
            assert target or a[0][0] != b[0][0]
            sources |= {a[0][0], b[0][0]}
        seen.append(sources)
        assert 0.35 < split.targets.mean() < 0.65
    assert not seen[0] & seen[1]
    assert len(seen[0]) > 2 * len(seen[1]) > 10
    again = builtin.builtin_dataset()
    assert again.train.texts == dataset.train.texts


# -- baselines ----------------------------------------------------------------------------------------


def toy(count: int, seed: int, *, regression: bool = False) -> Split:
    """Sentences of 3 to 9 words of which one, anywhere, is the label's."""
    draw = np.random.default_rng(seed)
    texts, targets = [], []
    for _ in range(count):
        words = draw.choice(["the", "of", "a", "list", "string"], draw.integers(2, 9)).tolist()
        target = int(draw.integers(0, 3 if regression else 2))
        words.insert(int(draw.integers(0, len(words))), ("object", "class", "function")[target])
        texts.append((" ".join(words),))
        targets.append(target)
    return Split(tuple(texts), np.array(targets, np.float64 if regression else np.int64))


CLASSES = Task("toy", ("text",), "label", ("accuracy", "f1"), ("0", "1"))
NUMBERS = Task("toy", ("text",), "label", ("pearson", "spearman"), is_regression=True)


def toy_dataset(*, regression: bool = False) -> Dataset:
    task = NUMBERS if regression else CLASSES
    return Dataset(task, toy(96, 1, regression=regression), toy(40, 2, regression=regression))


def test_a_bag_of_words_learns_words_and_what_a_pair_shares() -> None:
    assert bag_of_words(toy_dataset())["accuracy"] == 1
    assert bag_of_words(toy_dataset(regression=True))["pearson"] > 0.95
    draw, splits = np.random.default_rng(3), []
    for count in (400, 100):  # words of train and dev have none in common
        words = [f"w{count}{i}" for i in range(300)]
        target = draw.integers(0, 2, count)
        pairs = []
        for t in target:
            a, b, c, d = draw.choice(words, 4, replace=False)
            pairs.append((f"{a} {b}", f"{b} {c}" if t else f"{c} {d}"))
        splits.append(Split(tuple(pairs), target))
    assert bag_of_words(Dataset(CLASSES, *splits))["accuracy"] == 1


def test_the_majority_is_of_the_training_split() -> None:
    train = Split((("a",),) * 3, np.array([1, 1, 0]))
    dev = Split((("a",),) * 4, np.array([1, 0, 0, 0]))
    assert majority(Dataset(CLASSES, train, dev)) == {"accuracy": 0.25, "f1": pytest.approx(2 / 5)}
    numbers = majority(toy_dataset(regression=True))
    assert all(math.isnan(value) for value in numbers.values())


# -- weights ------------------------------------------------------------------------------------------


def without(folder: Path, target: Path, *names: str) -> Path:
    shutil.copytree(folder, target)
    for name in names:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return target


def test_a_run_and_its_hugging_face_folder_have_the_same_weights(run_folder: Path, tmp_path: Path) -> None:
    saved = {
        name.removeprefix("bert."): value
        for name, value in load_file(run_folder / "hf" / "model.safetensors").items()
        if name.startswith("bert.")
    }
    sources = {
        "checkpoints/step-": run_folder,
        "/hf": run_folder / "hf",
        "pruned/hf": without(run_folder, tmp_path / "pruned", "checkpoints"),
    }
    for part, source in sources.items():
        encoder = read_encoder(source)
        assert part in encoder.source
        assert encoder.weights is not None
        assert encoder.weights.keys() == saved.keys()
        model = Classifier(encoder, 2, seed=0)
        for name, value in saved.items():
            torch.testing.assert_close(encoder.weights[name], value, rtol=0, atol=0)
            torch.testing.assert_close(model.module.bert.get_parameter(name), value, rtol=0, atol=0)
    random = read_encoder(run_folder, with_weights=False)
    assert random.weights is None
    assert random.config.hidden_size == 32


@pytest.mark.parametrize(
    ("removed", "source", "message"),
    [
        (("checkpoints", "hf"), "", "the run has no weights, neither in checkpoints/ nor in hf/"),
        (("hf/model.safetensors",), "hf", "hf: no weights; expected model.safetensors"),
        (("tokenizer/tokenizer.json",), "", "tokenizer: no tokenizer there"),
        (("hf/tokenizer.json",), "hf", "hf: no tokenizer there"),
        (("config.yaml",), "", "expected a run's folder .config.yaml. or a Hugging Face folder"),
        ((), "nowhere", "nowhere: expected a run's folder"),
    ],
)
def test_folders_without_a_part_are_refused(
    removed: tuple[str, ...], source: str, message: str, run_folder: Path, tmp_path: Path
) -> None:
    folder = without(run_folder, tmp_path / "copy", *removed)
    with pytest.raises(ValueError, match=message):
        read_encoder(folder / source)


# -- training -----------------------------------------------------------------------------------------


def test_examples_are_as_hugging_face_encodes_and_cuts_them(encoder: Encoder) -> None:
    pairs = (
        ("a list of strings", "the function returns"),
        ("Object " * 30, "the " * 20),
        ("x", "[CLS] y " * 30),
    )
    split = Split(pairs[:2], np.array([0, 1]))
    examples = Examples(split, encoder.tokenizer, 20)
    batch = examples.batch(np.array([1, 0]))
    expected = encoder.tokenizer(
        [p[0] for p in pairs[:2]], [p[1] for p in pairs[:2]], truncation=True, max_length=20
    )
    assert batch.follows is not None
    assert batch.follows.tolist() == [0, 1]  # the shorter first
    assert batch.tokens.tolist() == list(chain(*expected["input_ids"]))
    assert batch.segments.tolist() == list(chain(*expected["token_type_ids"]))
    assert examples.cut == 1
    assert longest_first(([1, 2, 3, 4, 5], [6, 7]), 5) == [[1, 2, 3], [6, 7]]
    # A special piece in a text is text: the document still has one beginning.
    strange = Examples(Split(pairs[2:], np.array([0])), encoder.tokenizer, 20).batch(np.array([0]))
    assert strange.documents.count == 1


def test_outputs_are_those_of_hugging_face_over_padded_rows(encoder: Encoder) -> None:
    from transformers import BertForSequenceClassification

    model = Classifier(encoder, 3, seed=4).eval()
    reference = BertForSequenceClassification(model.module.config).eval()
    reference.load_state_dict(model.module.state_dict(), strict=False)
    texts = [["a list"], ["the function returns a string"], ["object"]]
    split = Split(tuple((text,) for (text,) in texts), np.array([0, 1, 2]))
    batch = Examples(split, encoder.tokenizer, 20).batch(np.arange(3))
    assert batch.follows is not None
    rows = encoder.tokenizer([text for (text,) in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch), reference(**rows).logits[batch.follows], rtol=1e-5, atol=1e-6
        )


def tuned(encoder: Encoder, dataset: Dataset, optimizer: str, lr: float) -> dict[str, float]:
    torch.set_num_threads(1)
    settings = Settings(optimizer, epochs=12, batch=16, warmup=0.1)
    problem = Sentences(dataset, encoder.tokenizer, max_length=24)
    return finetune(encoder, problem, settings, lr, 0, CPU)


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 5e-3), ("lamb", 5e-2)])
def test_a_tiny_model_learns_classes(optimizer: str, lr: float, encoder: Encoder) -> None:
    """Chance is about 0.5. A batch is sorted by length: outputs left in its order would be chance too."""
    found = tuned(encoder, toy_dataset(), optimizer, lr)
    assert found["accuracy"] >= 0.9
    assert found["f1"] >= 0.9
    assert found["loss"] < 0.5  # of a guess: 0.69


def test_a_tiny_model_learns_numbers(encoder: Encoder) -> None:
    assert tuned(encoder, toy_dataset(regression=True), "adamw", 5e-3)["pearson"] > 0.9


# -- the command --------------------------------------------------------------------------------------


def write_toy(folder: Path) -> list[str]:
    for name, split in (("train.tsv", toy(40, 5)), ("dev.tsv", toy(20, 6))):
        rows = [f"{text}\t{target}" for (text,), target in zip(split.texts, split.targets, strict=True)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return ["--data", str(folder), "--epochs", "1", "--max-length", "24"]


def test_the_same_seed_gives_the_same_bits(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    arguments = [
        "finetune",
        "--from",
        str(run_folder),
        *write_toy(tmp_path),
        "--lrs",
        "1e-3,3e-3",
        "--seeds",
        "3,4,5",
    ]
    results = []
    own = ["--task", "files", "--columns", "sentence", "--label", "label"]
    for task in (["--task", "SST-2"], own):
        out = tmp_path / f"{task[1]}.json"
        assert main([*arguments, *task, "--weights", "trained,random", "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    first, second = results
    assert len(first["runs"]) == 12
    for one, other in zip(first["runs"], second["runs"], strict=True):
        assert one == {name: other[name] for name in one}
    assert len({row["loss"] for row in first["runs"]}) == 12  # weights, rates and seeds all matter
    best = first["best"]["trained"]
    medians = {
        lr: sorted(r["accuracy"] for r in first["runs"] if (r["weights"], r["lr"]) == ("trained", lr))[1]
        for lr in (1e-3, 3e-3)
    }
    assert best["accuracy"] == max(medians.values()) == medians[best["lr"]]
    shown = capsys.readouterr().out
    assert f"| trained weights | {best['accuracy']:.4g} |" in shown
    assert "| most frequent label |" in shown
    assert "| bag of words |" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "RTE"], "no train split: give --data FOLDER or --train FILE"),
        (["--task", "RTE", "--train", "x.tsv"], "no dev split"),
        (["--task", "RTE", "--data", "nowhere"], "nowhere/train.tsv: no such file"),
        (["--task", "MNLI", "--train", "{toy}", "--data", "nowhere"], "no column"),
        (["--task", "files", "--data", "x"], "needs --columns and --label"),
        (["--task", "RTE", "--label", "y"], "takes no --label"),
        (["--data", "x"], "--task builtin takes no --data"),
        (["--weights", "pretrained"], "--weights ['pretrained']: expected trained or random"),
        (["--lrs", "0"], "--lrs [0.0]: expected different positive numbers"),
        (["--seeds", "-1"], "--seeds [-1]: expected different numbers from 0"),
        (["--seeds", "0,1,0"], "--seeds [0, 1, 0]: expected different numbers from 0"),
        (["--lrs", "1e-4,1e-4"], "--lrs [0.0001, 0.0001]: expected different positive numbers"),
        (["--out", "/proc/x.json"], "--out /proc/x.json: /proc cannot be written"),
        (["--out", "{folder}"], "expected a file, and it is a folder"),
        (["--warmup", "1"], "--warmup 1.0: expected a number in [0, 1)"),
        (
            ["--task", "SST-2", "--data", "{folder}", "--max-length", "33"],
            "--max-length 33: expected 8 to the model's 32",
        ),
    ],
)
def test_bad_arguments_are_errors_in_one_line(
    arguments: list[str], message: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy(tmp_path)
    filled = [a.format(toy=tmp_path / "train.tsv", folder=tmp_path) for a in arguments]
    assert main(["finetune", "--from", str(run_folder), *filled]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--lrs", "a", "numbers separated by commas, got 'a'"),
        ("--seeds", "0,x", "integers separated by commas, got '0,x'"),
        ("--epochs", "0", "an integer >= 1, got '0'"),
    ],
)
def test_values_that_are_no_numbers(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--from", "runs/mine", option, value])
    assert f"argument {option}: expected {expected}" in capsys.readouterr().err


def test_help_is_the_command_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    assert "usage: python -m sharded_lamb.bert finetune" in capsys.readouterr().out


def test_it_refuses_ranks(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["finetune", "--from", str(run_folder)]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
