"""A `python` for tests that start programs: its processes are forked from one that has imported torch.

    subprocess.run([interpreter.python(), "-m", "sharded_lamb", ...])
    subprocess.run(["launch/torchrun.sh", ...], env={"VIRTUAL_ENV": str(interpreter.prefix()), ...})

A new interpreter spends five seconds of CPU time on its imports. This `python` is a small program that asks the server
to fork: the fork gets its arguments, environment, folder and open files, runs the module, script or code as
``__main__`` in its network namespace, and ends after its exit functions, without the interpreter's finalization, which
would take a second of its own. If PYTHONPATH has another `sharded_lamb`, the fork imports that one.
Signals, exit codes and death are handed on in both directions. Other calls (``python -V``) get the real interpreter.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tests import fork_server
from tests.harness import _die_with_parent

ROOT = Path(__file__).resolve().parents[1]
CLIENT = """#!{python} -IS
import json, os, resource, signal, socket, sys

flags, rest = [], sys.argv[1:]
while rest and rest[0] in ("-u", "-B", "-s"):
    flags.append(rest.pop(0))
program = {program!r}
if program:
    rest = [program, *rest]
if not rest or (rest[0].startswith("-") and rest[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *flags, *rest])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
request = [rest, dict(os.environ), os.getcwd(), "-u" in flags, os.path.join({folder!r}, "python"), limits]
text = json.dumps(request).encode("utf-8", "surrogateescape")
socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2, os.open("/proc/self/ns/net", os.O_RDONLY)])
server.sendall(text)
replies = server.makefile("r")
pid = int(replies.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(replies.readline() or -signal.SIGKILL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""
PROGRAMS = ("torchrun", "sharded-lamb", "sharded-lamb-deepspeed")
MODULES = (
    "datasets",
    "matplotlib.figure",
    "sharded_lamb.recipes.training.picture",
    "sharded_lamb.bert.train",
    "sharded_lamb.preflight",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "torch.distributed.run",
    "torch.utils.tensorboard",
)


def python() -> str:
    return str(prefix() / "bin" / "python")


@cache
def prefix() -> Path:
    """The folder, whose server ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="interpreter-")
    atexit.register(folder.cleanup)
    bin_folder, address = Path(folder.name, "bin"), str(Path(folder.name, "server"))
    bin_folder.mkdir()
    here = Path(sys.executable).parent
    for name in ("python", "python3", *PROGRAMS):
        program = str(here / name) if name in PROGRAMS else ""
        client = CLIENT.format(
            python=sys.executable,
            program=program,
            address=address,
            folder=str(bin_folder),
        )
        (bin_folder / name).write_text(client)
        (bin_folder / name).chmod(0o755)
    for other in here.iterdir():  # tools that tests call by name
        if not (bin_folder / other.name).exists():
            (bin_folder / other.name).symlink_to(other)
    server = fork_server.context().Process(target=serve, args=(address,))
    server.start()
    atexit.register(server.join)
    atexit.register(server.kill)
    while not Path(address).exists():
        assert server.is_alive(), "the server of tests.interpreter ended"
        time.sleep(0.02)
    return Path(folder.name)


def serve(address: str) -> None:
    """Forks until it is killed."""
    _die_with_parent()
    for module in MODULES:
        importlib.import_module(module)
    picture = sys.modules["sharded_lamb.recipes.training.picture"]
    draw = picture.draw_run
    # Drawing takes as long as training. torchrun looks up its caller's name for a log in all of these modules' files.
    picture.draw_run = lambda rows, path: draw(rows, path) if "DRAWS" in os.environ else path
    sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"].get_method_name = lambda depth=2: (
        ""
    )
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    clients: dict[socket.socket, int] = {}  # connection: process
    forks: dict[int, socket.socket] = {}  # pidfd: connection
    while True:
        ready, _, _ = select.select([listener, *clients, *forks], [], [])
        for source in ready:
            if source is listener:
                client, _ = listener.accept()
                request, files = _received(client)
                pid = os.fork()
                if pid == 0:
                    _die_with_parent()
                    for other in (listener, client, *clients):
                        other.close()
                    _end(_run(request, files))
                for file in files:
                    os.close(file)
                clients[client] = pid
                forks[os.pidfd_open(pid)] = client
                client.sendall(f"{pid}\n".encode())
            elif isinstance(source, int):
                client = forks.pop(source)
                os.close(source)
                _, status = os.waitpid(clients.pop(client), 0)
                with contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                client.close()
            elif source in clients and not source.recv(1):  # the caller was killed
                os.kill(clients[source], signal.SIGKILL)
                client, pid = source, clients.pop(source)
                pidfd = next(fd for fd, connection in forks.items() if connection is client)
                del forks[pidfd]
                os.close(pidfd)
                os.waitpid(pid, 0)
                client.close()


def _received(client: socket.socket) -> tuple[list[Any], list[int]]:
    head, files, _, _ = socket.recv_fds(client, 8, 4)
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        text += client.recv(1 << 16)
    return json.loads(text), list(files)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _end(code: int) -> NoReturn:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _run(request: list[Any], files: list[int]) -> int:
    """Run a program as ``__main__`` in this fork; its exit code."""
    arguments, environment, folder, unbuffered, executable, limits = request
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    *streams, namespace = files
    if os.fstat(namespace).st_ino != os.stat("/proc/self/ns/net").st_ino:  # else no permission is needed
        _enter(namespace)
    os.close(namespace)
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if unbuffered or os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*added, *(entry for entry in sys.path if entry not in ("", str(ROOT), *added))]
    package = next((entry for entry in added if Path(entry, "sharded_lamb").is_dir()), str(ROOT))
    if Path(package).resolve() != ROOT:  # another one than has been imported here
        kept = {"sharded_lamb.recipes.training.picture"}  # which does not draw
        for name in {name for name in sys.modules if name.partition(".")[0] == "sharded_lamb"} - kept:
            del sys.modules[name]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            sys.modules.pop(
                arguments[1], None
            )  # imported again, as by an interpreter that has not imported it
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.path.insert(0, "")
            space = sys.modules["__main__"].__dict__
            exec(compile(arguments[1], "<string>", "exec"), space)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
