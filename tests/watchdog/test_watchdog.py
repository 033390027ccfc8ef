"""The watchdog names the stuck rank, on every rank that can print, and no other; otherwise it prints nothing."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from sharded_lamb.watchdog import EXIT_CODE, Watchdog, store_channel
from sharded_lamb.watchdog.diagnosis import DONE, Ledger, Report, rank_ranges
from sharded_lamb.watchdog.stack_probe import (
    COMPUTES,
    MAY_WAIT,
    WAITS,
    Frame,
    Member,
    locate_thread,
    parsed,
    stack_of_thread,
)
from tests import fork_server
from tests.forked import Forked, forked
from tests.harness import run_ranks
from tests.watchdog import watchdog_cases as cases

TIMEOUT_S = 3.0
"""A healthy rank is a suspect after a third of it, and a store after a half: at 1.5 s a loaded machine shows both."""


# -- in real processes ----------------------------------------------------------------------------------


@contextmanager
def ranks(
    world_size: int,
    trouble: str,
    troubled: int,
    *,
    store_on_rank_0: bool = False,
) -> Iterator[list[Forked]]:
    """Ranks that run `watchdog_cases.train`; this process serves the store, as torchrun does, or rank 0."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if store_on_rank_0:
        del store
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(not store_on_rank_0),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "SHARDED_LAMB_KERNEL": "torch",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                forked(
                    cases.train,
                    trouble,
                    troubled,
                    TIMEOUT_S,
                    **environment,
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                )
            )
            for rank in range(world_size)
        ]


def test_a_rank_that_hangs_in_forward_is_named_by_all() -> None:
    with ranks(3, "sleep", 1) as processes:
        for rank, process in enumerate(processes):
            status, said = process.ended()
            assert status == EXIT_CODE
            message = said[said.index("sharded_lamb watchdog") :]
            assert message.startswith(
                f"sharded_lamb watchdog (on rank {rank}): rank 1 hangs while others wait for it"
            )
            assert f"pid {processes[1].pid}): at watchdog/watchdog_cases.py:" in message
            assert " oversleep, last beat" in message
            assert "ranks 0, 2" in message
            assert "waiting in a collective at comm/pending.py" in message
            assert said.count("sharded_lamb watchdog") == 1
            assert ("time.sleep(600)" in said) is (rank == 1)  # the stack of the one that hangs


def test_a_rank_that_comes_late_to_ddps_buffers_is_named() -> None:
    """The others wait in C++, in a call from outside the files of collectives."""
    with ranks(2, "late", 0) as processes:
        status, said = processes[1].ended()
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
            status, said = processes[rank].ended()
            assert status == EXIT_CODE
            assert f"(on rank {rank}): rank {troubled} no longer responds" in said
            assert f"  rank {troubled} (host" in said
            assert f"pid {processes[troubled].pid}): " in said
            assert what in said
            assert said.count("sharded_lamb watchdog") == 1
        assert processes[troubled].is_running()


def test_where_the_store_stops_with_a_rank_the_others_end_by_themselves() -> None:
    with ranks(2, "stop", 0, store_on_rank_0=True) as processes:
        status, said = processes[1].ended()
    assert status == EXIT_CODE
    assert "the ranks' store does not answer" in said
    assert f"pid {processes[0].pid}): its process is stopped" in said


@pytest.mark.parametrize(
    ("trouble", "what"), [("die", "its process has ended"), ("raise", "left (KeyError: 'a bad sample')")]
)
def test_a_broken_connection_is_explained(trouble: str, what: str) -> None:
    with ranks(3, trouble, 1) as processes:
        for rank in (0, 2):
            status, said = processes[rank].ended()
            assert status == 1  # its own error, with a note
            assert "RuntimeError" in said
            assert "sharded_lamb watchdog: rank 1 (host" in said
            assert f"pid {processes[1].pid}): {what}" in said


def test_a_rank_that_is_slow_and_alive_raises_no_alarm() -> None:
    with ranks(2, "slow", 1) as processes:
        for process in processes:
            status, said = process.ended()
            assert status == 0, said
            assert "finished" in said
            assert "watchdog" not in said


def test_a_job_that_is_suspended_and_resumes_raises_no_alarm() -> None:
    """As by ``scontrol suspend``, a pause of containers, or of the machines."""
    with ranks(2, "announce", 1) as processes:
        wait_for(lambda: "here\n" in processes[1].output())
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT_S)
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        for process in processes:
            status, said = process.ended()
            assert status == 0, said
            assert "finished" in said
            assert "watchdog" not in said


# -- in one process --------------------------------------------------------------------------------------


def test_alone_it_watches_this_process() -> None:
    with forked(partial(cases.hang_after_beat, full_pipe=False), "first") as process:
        status, said = process.ended()
    assert status == 7
    assert 'hang_after_beat, last beat "first"' in said


def test_the_end_of_an_interpreter_closes_it() -> None:
    code = """
from sharded_lamb.watchdog import Watchdog
Watchdog(30).beat("only")
print("finished")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "finished\n", "")


@pytest.mark.parametrize(
    ("beat", "full_pipe"),
    [("data-\udcff.txt", False), ("y" * 9, True)],
    ids=["no UTF-8", "a full pipe for stderr"],
)
def test_it_exits_whatever_a_beat_holds_and_though_stderr_is_full(beat: str, full_pipe: bool) -> None:
    with forked(partial(cases.hang_after_beat, full_pipe=full_pipe), beat) as process:
        status, said = process.ended()
    assert status == 7
    assert ("last beat" in said) is not full_pipe


def test_a_signal_handler_may_beat_in_the_middle_of_a_beat() -> None:
    with forked(cases.beat_in_a_signal_handler) as process:
        assert process.ended() == (0, "")


def outside(rank: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        with Watchdog(30, group=group):
            pass
    else:
        with pytest.raises(ValueError, match="rank 1 is not in group: make a Watchdog on its ranks only"):
            Watchdog(30, group=group)


def test_a_rank_outside_its_group_is_refused() -> None:
    run_ranks(2, outside)


def test_a_store_that_stops_for_longer_than_its_timeout_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_channel, "TIMEOUT", timedelta(seconds=1))
    receiver, sender = fork_server.context().Pipe(duplex=False)
    with forked(cases.serve_a_store, sender) as process:
        assert receiver.poll(60)
        channel = store_channel.StoreChannel(
            dist.TCPStore("127.0.0.1", receiver.recv(), is_master=False),
            "test",
            [Member.here(0)],
            0,
            lambda: report(0),
            time.monotonic,
            period_s=0.05,
            silent_s=10,
            timeout_s=30,
        )
        channel.announce()
        channel.start()
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
        resumed_at = time.monotonic()
        wait_for(lambda: channel.answered_at > resumed_at + 0.1)
        channel.close(None)


def test_a_report_that_fails_is_logged_and_the_next_one_follows(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def fails_at_first() -> Report:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is `announce`'s
            raise TypeError("no line")
        return report(0)

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members, periods = [Member.here(0)], {"period_s": 0.02, "silent_s": 10.0, "timeout_s": 30.0}
    channel = store_channel.StoreChannel(store, "test", members, 0, fails_at_first, time.monotonic, **periods)
    channel.announce()
    started_at = channel.answered_at
    channel.start()
    wait_for(lambda: channel.answered_at > started_at)
    channel.close(None)
    assert "one report of this rank failed" in caplog.text
    assert "TypeError: no line" in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("not so after 30 s")


def test_its_threads_end_with_it_and_nothing_is_printed_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
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


# -- the diagnosis, without processes ------------------------------------------------------------------------


def report(
    posts: int,
    *,
    idle: float = 10.0,
    waits: int = WAITS,
    at: str = "a.py:1 f",
    patience: float = 5.0,
    ended: str | None = None,
    lost_peer: bool = False,
) -> Report:
    return Report(posts, idle, patience, "step 1", at, waits, ended, lost_peer)


def ledger(*reports: Report, silent: tuple[int, ...] = ()) -> Ledger:
    """Ranks that reported at second 0, and all but the silent ones again at second 10; silence is 3 s."""
    members = [Member(rank, f"h{rank}", 100 + rank, "elsewhere") for rank in range(len(reports))]
    book = Ledger(members, silent_s=3.0, timeout_s=9.0)
    for index, first in enumerate(reports):
        book.record(index, Report.loaded(first.dumped()), 0.0)
        later = first if index in silent else Report(**{**first.__dict__, "posts": first.posts + 1})
        book.record(index, later, 10.0)
    return book


@pytest.mark.parametrize(
    ("book", "headline"),
    [
        (ledger(report(1), report(1, waits=COMPUTES), report(1)), "rank 1 hangs while"),
        (ledger(report(1), report(1, waits=MAY_WAIT), report(1)), "rank 1 may hang while"),
        (ledger(report(1, waits=MAY_WAIT), report(1, waits=COMPUTES)), "rank 1 hangs while"),
        (
            ledger(report(1), report(1), silent=(1,)),
            "rank 1 no longer responds; no rank has made progress for",
        ),
        (ledger(report(1), report(1, waits=COMPUTES), report(1), silent=(2,)), "rank 2 no longer responds"),
        (
            ledger(report(1), report(1), report(1, ended="OSError: x"), silent=(1,)),
            "rank 2 no longer responds",
        ),
        (
            ledger(report(1), report(1, ended="RuntimeError: y", lost_peer=True), report(1), silent=(2,)),
            "rank 2 no longer responds",
        ),
        (ledger(report(1), report(1, waits=COMPUTES), report(1, ended=DONE)), "rank 1 hangs"),
        (ledger(report(1), report(1), report(1, ended=DONE)), "rank 2 no longer responds"),
        (ledger(report(1), report(1, ended="RuntimeError: z", lost_peer=True)), "rank 1 no longer responds"),
        (
            ledger(report(1, waits=COMPUTES), report(1, ended="RuntimeError: z", lost_peer=True)),
            "rank 0 hang",
        ),
        (ledger(report(1), report(1)), "ranks 0-1 wait for each other in collectives"),
        (ledger(report(1, waits=COMPUTES), report(1, waits=COMPUTES)), "ranks 0-1 hang, and none"),
    ],
)
def test_who_is_named(book: Ledger, headline: str) -> None:
    diagnosis = book.diagnosis(10.0)
    assert diagnosis is not None
    assert diagnosis.startswith(headline)


@pytest.mark.parametrize(
    "book",
    [
        ledger(report(1), report(1, idle=4.9)),  # one still beats
        ledger(report(1), report(1, patience=float("inf"))),  # one is paused
        ledger(report(1, ended=DONE), report(1, ended=DONE)),
    ],
)
def test_no_diagnosis_while_a_rank_makes_progress(book: Ledger) -> None:
    assert book.diagnosis(10.0) is None


def test_a_rank_that_does_not_respond_has_until_its_patience_is_over() -> None:
    book = ledger(report(1), report(1, idle=1.0, patience=8.0), silent=(1,))
    assert book.is_silent(1, 6.0)
    assert book.diagnosis(6.0) is None
    diagnosis = book.diagnosis(7.5)
    assert diagnosis is not None
    assert diagnosis.startswith("rank 1 no longer responds")


def test_a_pause_of_a_process_that_is_gone_holds_no_rank() -> None:
    diagnosis = ledger(report(1), report(1, idle=0, patience=float("inf")), silent=(1,)).diagnosis(10.0)
    assert diagnosis is not None
    assert diagnosis.startswith("rank 1 no longer responds")


def test_many_ranks_at_one_place_are_one_line() -> None:
    diagnosis = ledger(
        *[report(1, waits=COMPUTES if rank == 77 else WAITS) for rank in range(500)]
    ).diagnosis(10.0)
    assert diagnosis is not None
    assert len(diagnosis.splitlines()) == 4
    assert "ranks 0-76, 78-499 (hosts h0, h1, h2, h3, …): waiting in a collective at a.py:1 f" in diagnosis


def test_rank_ranges() -> None:
    assert rank_ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"
    assert rank_ranges([]) == ""


# -- where a thread is ------------------------------------------------------------------------------------


def where(fn: object, *args: object) -> tuple[str, int]:
    thread = threading.Thread(target=fn, args=args, daemon=True)  # type: ignore[arg-type]
    thread.start()
    assert thread.ident is not None
    time.sleep(0.2)
    location = locate_thread(thread.ident)
    return location.at, location.waits


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


DUMP = r"""Thread 0x00007fcc20d8e6c0 (most recent call first):
  File "/srv/\u6a21\xe9/train.py", line 12 in forward
  File ???, line ??? in ???
  ...

Current thread 0x00007fcc41d21b80 [main] (most recent call first):
  File "<string>", line 7 in <module>

Thread 0x00007fcc00000000 (most recent call first):
  <no Python frame>
"""


def test_stacks_are_those_of_faulthandler() -> None:
    forward, unknown = Frame("/srv/\u6a21\xe9/train.py", 12, "forward"), Frame("???", 0, "???")
    stacks = {
        0x7FCC20D8E6C0: [forward, unknown],
        0x7FCC41D21B80: [Frame("<string>", 7, "<module>")],
        0x7FCC00000000: [],
    }
    assert parsed(DUMP) == (stacks, True)
    assert parsed(f"{DUMP}...\n") == (stacks, False)
    assert str(forward) == "\u6a21\xe9/train.py:12 forward"
    assert (forward.source, unknown.source) == ("", "")


def test_another_threads_frames_are_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That can end the process by SIGSEGV where the thread continues meanwhile (CPython 3.11)."""
    monkeypatch.delattr(sys, "_current_frames")
    at, _ = where(_sleeps)
    assert at.split()[1] == "_sleeps"
    assert f"{Path(__file__).name}:{_sleeps.__code__.co_firstlineno + 1}" in at


def test_a_thread_among_too_many_to_show_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(101)]
    for thread in threads:
        thread.start()
    first = threading.main_thread().ident  # faulthandler begins with the newest
    assert first is not None
    location = locate_thread(first)
    over.set()
    for thread in threads:
        thread.join()
    assert (location.at, location.waits) == ("an unknown place", MAY_WAIT)
    assert locate_thread(first).at != location.at


def test_a_process_that_can_open_no_file_is_at_an_unknown_place() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        location, stack = locate_thread(threading.get_ident()), stack_of_thread(threading.get_ident())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (location.at, location.waits, stack) == ("an unknown place", MAY_WAIT, "")


def test_the_source_of_a_file_that_is_not_ascii_is_read(tmp_path: Path) -> None:
    file = tmp_path / "\u6a21\xe9.py"
    file.write_text("def naps(work):\n    work.wait(2)\n")
    code: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), code)
    assert where(code["naps"], SimpleNamespace(wait=time.sleep)) == (
        f"{tmp_path.name}/{file.name}:2 naps",
        WAITS,
    )


def test_a_member_here_is_alive_and_a_child_that_ended_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    me = Member.here(0)
    gone = Member(1, me.host, child.pid, me.machine)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until its parent asks
    assert (me.process_state(), gone.process_state()) == (None, "has ended")
    child.wait()
    assert gone.process_state() == "has ended"
    assert Member(1, "h", child.pid, "another machine").process_state() is None
