"""The commands as users type them: in processes of their own, or where those cost much, on ranks of the harness."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from sharded_lamb.__main__ import main as sharded_lamb_command
from sharded_lamb.bert import study
from sharded_lamb.bert.__main__ import main
from sharded_lamb.checkpoint import problem_with, read_contents
from sharded_lamb.recipes.training import picture
from tests import interpreter
from tests.bert.conftest import LENGTH
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """torchrun starts ranks by PYTHON_EXEC."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **settings, "PYTHON_EXEC": interpreter.python(), **more}


def write_config(tree: dict[str, Any], folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "run_dir": str(folder / "run"), **changed}))
    return path


def torchrun(
    ranks: int, config: Path, *arguments: str, restarts: int = 0, python: str | None = None
) -> list[str]:
    """``python``: torchrun's own; by default one that need not import torch."""
    options = (f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "-m", "sharded_lamb.bert")
    return [
        python or interpreter.python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        *options,
        "--config",
        str(config),
        *arguments,
    ]


def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_rows(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, "the run ended before it was interrupted"
        time.sleep(0.01)


def processes_with(setting: str) -> list[int]:
    """Process ids of all that were started with ``setting`` in their environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if setting.encode() in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids


def parent_of(pid: int) -> int:
    (line,) = re.findall(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line)


def call_main(rank: int, arguments: list[str]) -> tuple[int, str]:
    """`python -m sharded_lamb.bert` on a rank of the harness: (exit code, what it writes to stderr as errors).

    A run draws no picture.
    """
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()) as said, mock.patch.object(picture, "draw_run"):
        code = main(arguments)
    return code, "".join(line for line in said.getvalue().splitlines(True) if line.startswith("error"))


LONG = {
    "phases": [
        {"steps": 60, "global_batch": 12, "sequence_length": LENGTH, "lr": 0.01, "warmup_fraction": 0.2}
    ],
    "checkpoint": {"every_steps": 10, "keep": 0},
}


def test_a_signal_saves_and_exits_with_the_code_that_requeues(tree: dict[str, Any], tmp_path: Path) -> None:
    """Each signal stops the run once; the third start, in a worker of the harness, completes it."""
    config = write_config(
        tree, tmp_path, **{**LONG, "checkpoint": {"every_steps": 1000, "requeue_exit_code": 85}}
    )
    run, stopped_at = tmp_path / "run", [0]
    arguments = ["--config", str(config), "--resume", "auto"]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = subprocess.Popen(
            [interpreter.python(), "-m", "sharded_lamb.bert", *arguments],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        wait_for_rows(run, stopped_at[-1] + 5, process)
        process.send_signal(number)
        assert process.wait(120) == 85
        saved = sorted((run / "checkpoints").glob("step-*"))
        assert len(saved) == len(stopped_at)
        assert problem_with(saved[-1]) is None
        done = int(saved[-1].name.removeprefix("step-"))
        assert stopped_at[-1] + 5 <= done < 60
        assert rows_of(run)[-1]["step"] == done
        stopped_at.append(done)
    assert run_ranks(1, call_main, arguments) == [(0, "")]
    assert [row["step"] for row in rows_of(run)] == [*range(1, 61), 60]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_pretrain_hands_a_signal_to_its_ranks_and_ends_after_their_save(
    number: signal.Signals, tree: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(
        tree, tmp_path, **{**LONG, "checkpoint": {"every_steps": 1000, "requeue_exit_code": 85}}
    )
    command = [
        interpreter.python(),
        "-m",
        "sharded_lamb",
        "pretrain",
        "--config",
        str(config),
        "--ranks",
        "1",
    ]
    mark = f"{tmp_path}"
    process = subprocess.Popen(
        command,
        env=environment(MARK=mark),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_rows(tmp_path / "run", 5, process)
    patient = processes_with("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100")
    assert {*processes_with(f"MARK={mark}")} & {*patient}
    process.send_signal(number)
    assert process.wait(120) == 85
    assert processes_with(f"MARK={mark}") == []
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert problem_with(saved) is None


def test_pretrain_rejects_once_what_no_rank_could_run(
    tree: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tree, tmp_path)
    with mock.patch.object(subprocess, "Popen", side_effect=AssertionError("it has started ranks")):
        assert sharded_lamb_command(["pretrain", "--config", str(config), "--ranks", "5"]) == 2
        assert "can't be split evenly over 5 ranks" in capfd.readouterr().err
        to = ["pretrain", "--config", str(config), "--ranks", "1", "run_dir=/proc/run"]
        assert sharded_lamb_command(to) == 2
    assert "run_dir=/proc/run: /proc cannot be written" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sentence", "message"),
    [("no blank", "expected [MASK] in it"), ("a [MASK] " * 40, "expected at most 32 (model.max_positions)")],
)
def test_a_sentence_that_cannot_be_completed_is_refused_before_training(
    sentence: str, message: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tree, tmp_path, log={"fill_mask": [sentence]})
    ((code, said),) = run_ranks(1, call_main, ["--config", str(config)])
    assert code == 1
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_written_ends_every_rank_and_loses_nothing(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tree, tmp_path, checkpoint={"every_steps": 2, "keep": 0})
    run = tmp_path / "run"
    assert run_ranks(2, call_main, ["--config", str(config)]) == [(0, "")] * 2
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(run / "checkpoints" / later)
    # No file may grow beyond 100 KiB, less than the weights: writing fails halfway, as on a full disk.
    command = shlex.join(torchrun(2, config, "--resume", "auto"))
    failed = call(["bash", "-c", f"ulimit -f 100; exec {command}"])
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if "error (rank" in line]
    assert len(errors) == 2, failed.stderr
    assert all("step-00000004 could not be written" in line for line in errors), errors
    (good,) = (run / "checkpoints").glob("step-*")
    assert problem_with(good) is None
    assert [row["step"] for row in rows_of(run)][:2] == [1, 2]


BAD_INPUT = [
    (2, "model.layrs=2", "unknown key 'model.layrs': did you mean 'layers'?"),
    (2, "data.source=[/nowhere/*.txt]", "data.source '/nowhere/*.txt': no such file"),
    (3, "phases.0.global_batch=8", "global_batch=8 can't be split evenly over 3 ranks"),
]


@pytest.mark.parametrize(("ranks", "override", "message"), BAD_INPUT)
def test_bad_input_is_a_clear_error_on_every_rank(
    tree: dict[str, Any], tmp_path: Path, ranks: int, override: str, message: str
) -> None:
    arguments = ["--config", str(write_config(tree, tmp_path)), override]
    for rank, (code, said) in enumerate(run_ranks(ranks, call_main, arguments)):
        assert code == 1
        assert re.search(rf"error \(rank {rank}\): .*{re.escape(message)}", said), said


def test_under_torchrun_bad_input_is_an_error_without_our_traceback(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    ranks, override, message = BAD_INPUT[1]
    failed = call(torchrun(ranks, write_config(tree, tmp_path), override, python=sys.executable))
    assert failed.returncode != 0
    for rank in range(ranks):
        assert re.search(rf"error \(rank {rank}\): .*{re.escape(message)}", failed.stderr), failed.stderr
    assert f"{Path('sharded_lamb', 'bert')}/" not in failed.stderr, "a traceback through our own files"


def test_the_quickstart_leaves_all_it_promises(tmp_path: Path, tree: dict[str, Any]) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    run = tmp_path / "run"
    small = ["phases=[{steps: 8, global_batch: 24, sequence_length: 32, lr: 0.01, warmup_fraction: 0.1}]"]
    small += [f"data.prepared={tree['data']['prepared']}", f"data.source=['{tree['data']['source'][0]}']"]
    small += ["tokenizer.vocab_size=1024", f"run_dir={run}"]
    path = f"{interpreter.prefix()}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        [str(ROOT / "launch" / "quickstart"), "--use-current-env", *small],
        env=environment(PATH=path, DRAWS="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"run: {run}"
    *steps, final = rows_of(run)
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all({"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= row.keys() for row in steps)
    assert {"heldout_loss", "heldout_accuracy", "unigram_entropy"} <= final.keys()
    assert f"unigram entropy of the corpus: {final['unigram_entropy']:.3f}" in done.stdout
    assert list(run.glob("*.png"))
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["tokenizer"]["vocab_size"] == 1024
    assert (run / "tokenizer" / "tokenizer.json").exists()
    assert len(json.loads((run / "fill_mask.json").read_text())) == 3

    model = AutoModelForMaskedLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    saved = read_contents(run / "checkpoints" / "step-00000008").weights
    assert all((p == saved[name]).all() for name, p in model.named_parameters())
    assert tokenizer("a [MASK]")["input_ids"][2] == tokenizer.mask_token_id


def call_study(rank: int, arguments: list[str]) -> tuple[int, str]:
    """`call_main` of a study whose search begins near the best rate of two steps."""
    with mock.patch.dict(study._FIRST_LR, lamb=1.28):
        return call_main(rank, arguments)


def test_the_study_tunes_at_every_batch_on_the_same_examples(tree: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tree, tmp_path)
    options = ["--batches", "24", "--optimizers", "lamb", "--seeds", "2"]
    arguments = ["study", "--config", str(config), *options, "phases.0.steps=4", "phases.0.global_batch=12"]
    assert run_ranks(1, call_study, arguments) == [(0, "")]
    results = json.loads((tmp_path / "run" / "study.json").read_text())
    assert {(row["steps"], row["batch"]) for row in results} == {(2, 24)}
    best, again = (row for row in results if row["chosen"])
    assert [again[name] for name in ("lr", "warmup", "seed")] == [
        best["lr"],
        best["warmup"],
        best["seed"] + 1,
    ]
    tuned = [row for row in results if row["seed"] == best["seed"]]
    assert len([row for row in tuned if row["lr"] in (best["lr"] / 2, best["lr"] * 2)]) == 2
    assert all(row["heldout_loss"] >= best["heldout_loss"] for row in tuned)
    assert (tmp_path / "run" / "study.png").exists()
    assert (tmp_path / "run" / "study.md").read_text().count("| lamb |") == 1
