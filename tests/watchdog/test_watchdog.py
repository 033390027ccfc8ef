"""The watchdog names the rank that hangs, on every rank that can speak, and no other; and it keeps still otherwise."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from sharded_lamb.watchdog import EXIT_CODE, Watchdog
from sharded_lamb.watchdog import store_channel as talk
from sharded_lamb.watchdog.diagnosis import DONE, Ledger, Report, spans
from sharded_lamb.watchdog.stack_probe import COMPUTES, MAY_WAIT, WAITS, Member, place_of_thread
from tests.harness import run_ranks

TIMEOUT_S = 3.0


# -- in real processes ----------------------------------------------------------------------------------


@contextmanager
def ranks(
    world_size: int, trouble: str, troubled: int, *, store_on_rank_0: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of `tests.watchdog.watchdog_cases`; the store is this process's, as under torchrun, or rank 0's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if store_on_rank_0:
        del store
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(not store_on_rank_0),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "SHARDED_LAMB_KERNEL": "torch",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "tests.watchdog.watchdog_cases", trouble, str(troubled), str(TIMEOUT_S)]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, what it said)"""
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def test_a_rank_that_hangs_in_forward_is_named_by_all() -> None:
    with ranks(3, "sleep", 1) as processes:
        for rank, process in enumerate(processes):
            status, said = ended(process)
            assert status == EXIT_CODE
            verdict = said[said.index("sharded_lamb watchdog") :]
            assert verdict.startswith(
                f"sharded_lamb watchdog (on rank {rank}): rank 1 hangs while others wait for it"
            )
            assert f"pid {processes[1].pid}): at tests/watchdog_cases.py:" in verdict
            assert " oversleep, last beat" in verdict
            assert "ranks 0, 2" in verdict
            assert "waiting in a collective at sharded_lamb/comm/collectives.py" in verdict
            assert said.count("sharded_lamb watchdog") == 1
            assert ("time.sleep(600)" in said) is (rank == 1)  # the stack of the one that hangs


def test_a_rank_that_comes_late_to_ddps_buffers_is_named() -> None:
    """The others wait below Python, in a call that is made in no file of collectives."""
    with ranks(2, "late", 0) as processes:
        status, said = ended(processes[1])
    assert status == EXIT_CODE
    assert "rank 0 hangs while others wait for it" in said


@pytest.mark.parametrize(
    ("trouble", "troubled", "what"),
    [("stop", 0, "its process is stopped"), ("gil", 1, "a call holds the GIL")],
    ids=["stopped: the first rank, so that another takes over", "GIL held"],
)
def test_a_rank_that_does_not_answer_is_named_by_the_others(trouble: str, troubled: int, what: str) -> None:
    with ranks(3, trouble, troubled) as processes:
        for rank in {0, 1, 2} - {troubled}:
            status, said = ended(processes[rank])
            assert status == EXIT_CODE
            assert f"(on rank {rank}): rank {troubled} does not answer any more" in said
            assert f"  rank {troubled} (host" in said
            assert f"pid {processes[troubled].pid}): " in said
            assert what in said
            assert said.count("sharded_lamb watchdog") == 1
        assert processes[troubled].poll() is None


def test_where_the_store_stops_with_a_rank_the_others_end_by_themselves() -> None:
    with ranks(2, "stop", 0, store_on_rank_0=True) as processes:
        status, said = ended(processes[1])
    assert status == EXIT_CODE
    assert "the store of the ranks does not answer" in said
    assert f"pid {processes[0].pid}): its process is stopped" in said


@pytest.mark.parametrize(
    ("trouble", "what"), [("die", "its process has ended"), ("raise", "left (KeyError: 'a bad sample')")]
)
def test_a_broken_connection_is_explained(trouble: str, what: str) -> None:
    with ranks(3, trouble, 1) as processes:
        for rank in (0, 2):
            status, said = ended(processes[rank])
            assert status == 1  # its own error, with a note
            assert "RuntimeError" in said
            assert "sharded_lamb watchdog: rank 1 (host" in said
            assert f"pid {processes[1].pid}): {what}" in said


def test_a_rank_that_is_slow_and_alive_raises_no_alarm() -> None:
    with ranks(2, "slow", 1) as processes:
        for process in processes:
            status, said = ended(process)
            assert status == 0, said
            assert "finished" in said
            assert "watchdog" not in said


def test_a_job_that_is_suspended_and_goes_on_raises_no_alarm() -> None:
    """As by ``scontrol suspend``, a pause of containers, or of the machines."""
    with ranks(2, "announce", 1) as processes:
        assert processes[1].stdout is not None
        assert processes[1].stdout.readline() == "here\n"
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(2 * TIMEOUT_S)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        for process in processes:
            status, said = ended(process)
            assert status == 0, said
            assert "finished" in said
            assert "watchdog" not in said


# -- in one process --------------------------------------------------------------------------------------


def test_alone_it_watches_this_process() -> None:
    code = """
import time
from sharded_lamb.watchdog import Watchdog
def stuck(): time.sleep(60)
with Watchdog(0.5, exit_code=7) as watchdog:
    watchdog.beat("first")
    stuck()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 7
    assert 'stuck, last beat "first"' in done.stderr


@pytest.mark.parametrize("beat", ["'data-\\udcff.txt'", "'y' * 9"], ids=["no UTF-8", "nobody reads"])
def test_it_ends_whatever_a_beat_holds_and_though_nobody_reads(beat: str) -> None:
    code = f"""
import os, time
from sharded_lamb.watchdog import Watchdog
with Watchdog(0.5, exit_code=7) as watchdog:
    watchdog.beat({beat})
    if "y" in watchdog._beat:
        while True: os.write(2, b"x" * 4096)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        assert process.wait(timeout=30) == 7
    finally:
        process.kill()
        process.communicate()


def test_a_signal_handler_may_beat_in_the_middle_of_a_beat() -> None:
    code = """
import signal
from sharded_lamb.watchdog import Watchdog
count = 0
def beat(*_):
    global count
    count += 1
    watchdog.beat("signal")
with Watchdog(60) as watchdog:
    signal.signal(signal.SIGALRM, beat)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    while count < 2000:
        watchdog.beat("loop")
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def outside(rank: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        with Watchdog(30, group=group):
            pass
    else:
        with pytest.raises(ValueError, match="rank 1 is not in group: make a Watchdog on its ranks only"):
            Watchdog(30, group=group)


def test_a_rank_outside_of_its_group_is_told() -> None:
    run_ranks(2, outside)


def test_a_store_that_stops_for_longer_than_its_timeout_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    monkeypatch.setattr(talk, "TIMEOUT", timedelta(seconds=1))
    try:
        assert process.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(process.stdout.readline()), is_master=False)
        said = talk.Talk(
            store,
            "test",
            [Member.here(0)],
            0,
            lambda: report(0),
            time.monotonic,
            period_s=0.05,
            silent_s=10,
            timeout_s=30,
        )
        said.introduce()
        said.start()
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        went_on = time.monotonic()
        wait_for(lambda: said.spoke > went_on + 0.1)
        said.close(None)
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come about in 30 s")


def test_its_threads_end_with_it_and_nothing_is_said_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with Watchdog(0.2) as watchdog:
        watchdog.beat("only")
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    time.sleep(0.5)
    watchdog.close()
    assert capfd.readouterr().err == ""


def test_without_a_timeout_nothing_is_watched() -> None:
    before = threading.active_count()
    with Watchdog(None) as watchdog, watchdog.paused("all of it"):
        watchdog.beat("one")
        assert threading.active_count() == before
        assert watchdog.explain(RuntimeError("Connection closed by peer")).args


def test_other_errors_get_no_note() -> None:
    with Watchdog(60) as watchdog:
        error = KeyError("mine")
        assert watchdog.explain(error) is error
        assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"exit_code": 0}, "exit_code=0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Watchdog(**arguments)  # type: ignore[arg-type]


# -- the verdict, without processes ------------------------------------------------------------------------


def report(
    posts: int,
    *,
    idle: float = 10.0,
    waits: int = WAITS,
    at: str = "a.py:1 f",
    patience: float = 5.0,
    ended: str | None = None,
    lost: bool = False,
) -> Report:
    return Report(posts, idle, patience, "step 1", at, waits, ended, lost)


def ledger(*reports: Report, silent: tuple[int, ...] = ()) -> Ledger:
    """Of ranks that reported at second 0, and again at second 10 but for the silent ones; 3 s make silence."""
    members = [Member(rank, f"h{rank}", 100 + rank, "elsewhere") for rank in range(len(reports))]
    book = Ledger(members, silent_s=3.0, timeout_s=9.0)
    for place, found in enumerate(reports):
        book.note(place, Report.loaded(found.dumped()), 0.0)
        if place not in silent:
            book.note(place, Report(**{**found.__dict__, "posts": found.posts + 1}), 10.0)
        else:
            book.note(place, found, 10.0)
    return book


@pytest.mark.parametrize(
    ("book", "headline"),
    [
        (ledger(report(1), report(1, waits=COMPUTES), report(1)), "rank 1 hangs while"),
        (ledger(report(1), report(1, waits=MAY_WAIT), report(1)), "rank 1 may hang while"),
        (ledger(report(1, waits=MAY_WAIT), report(1, waits=COMPUTES)), "rank 1 hangs while"),
        (ledger(report(1), report(1), silent=(1,)), "rank 1 does not answer"),
        (ledger(report(1), report(1, waits=COMPUTES), report(1), silent=(2,)), "rank 2 does not answer"),
        (ledger(report(1), report(1), report(1, ended="OSError: x"), silent=(1,)), "rank 2 does not answer"),
        (
            ledger(report(1), report(1, ended="RuntimeError: y", lost=True), report(1), silent=(2,)),
            "rank 2 does not",
        ),
        (ledger(report(1), report(1, waits=COMPUTES), report(1, ended=DONE)), "rank 1 hangs"),
        (ledger(report(1), report(1), report(1, ended=DONE)), "rank 2 does not answer"),
        (ledger(report(1), report(1, ended="RuntimeError: z", lost=True)), "rank 1 does not answer any more"),
        (ledger(report(1, waits=COMPUTES), report(1, ended="RuntimeError: z", lost=True)), "rank 0 hang"),
        (ledger(report(1), report(1)), "ranks 0, 1 wait in collectives for each other"),
        (ledger(report(1, waits=COMPUTES), report(1, waits=COMPUTES)), "ranks 0, 1 hang, and none"),
    ],
)
def test_who_is_named(book: Ledger, headline: str) -> None:
    verdict = book.verdict(10.0)
    assert verdict is not None
    assert verdict.startswith(headline)


@pytest.mark.parametrize(
    "book",
    [
        ledger(report(1), report(1, idle=4.9)),  # one still beats
        ledger(report(1), report(1, patience=float("inf"))),  # one is paused
        ledger(report(1, ended=DONE), report(1, ended=DONE)),
    ],
)
def test_no_verdict_while_somebody_comes_further(book: Ledger) -> None:
    assert book.verdict(10.0) is None


def test_a_rank_that_does_not_answer_has_until_its_beat_is_too_long_ago() -> None:
    book = ledger(report(1), report(1, idle=1.0, patience=8.0), silent=(1,))
    assert book.is_silent(1, 6.0)
    assert book.verdict(6.0) is None
    verdict = book.verdict(7.5)
    assert verdict is not None
    assert verdict.startswith("rank 1 does not answer")


def test_a_pause_of_a_process_that_is_gone_holds_nobody() -> None:
    verdict = ledger(report(1), report(1, idle=0, patience=float("inf")), silent=(1,)).verdict(10.0)
    assert verdict is not None
    assert verdict.startswith("rank 1 does not answer")


def test_many_ranks_at_one_place_are_one_line() -> None:
    verdict = ledger(*[report(1, waits=COMPUTES if rank == 77 else WAITS) for rank in range(500)]).verdict(
        10.0
    )
    assert verdict is not None
    assert len(verdict.splitlines()) == 4
    assert "ranks 0-76, 78-499 (hosts h0, h1, h2, h3, …): waiting in a collective at a.py:1 f" in verdict


def test_spans() -> None:
    assert spans([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7, 8"


# -- where a thread is ------------------------------------------------------------------------------------


def where(fn: object, *args: object) -> tuple[str, int]:
    thread = threading.Thread(target=fn, args=args, daemon=True)  # type: ignore[arg-type]
    thread.start()
    assert thread.ident is not None
    time.sleep(0.2)
    place = place_of_thread(thread.ident)
    return place.at, place.waits


def test_a_call_of_wait_waits_and_a_sleep_does_not() -> None:
    at, waits = where(_sleeps)
    assert (at.split()[1], waits) == ("_sleeps", COMPUTES)
    at, waits = where(_barrier)
    assert (at.split()[1], waits) == ("_barrier", WAITS)


def _sleeps() -> None:
    time.sleep(2)


def _barrier() -> None:
    class Work:
        wait = staticmethod(time.sleep)

    work = Work()
    work.wait(2)


def test_a_member_here_is_alive_and_a_child_that_ended_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    me = Member.here(0)
    gone = Member(1, me.host, child.pid, me.machine)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until its parent asks
    assert (me.fate(), gone.fate()) == (None, "has ended")
    child.wait()
    assert gone.fate() == "has ended"
    assert Member(1, "h", child.pid, "another machine").fate() is None
