"""A process that has imported torch and gaf, and forks others: ranks and commands.

In a fresh interpreter the imports are seconds of work.
"""

import atexit
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import Pipe, current_process, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# torch imports torch._dynamo at an optimizer's first step
BEFORE = ("jaxtyping", "torch", "torch._dynamo", "torch.distributed.fsdp")
AFTER = ("gaf", "gaf.ranks.ddp", "gaf.ranks.fsdp", "pytest")
START = "import sys; sys.path[:] = sys.argv[2:]; from helpers.warm import main; main()"

Target = Callable[..., None]  # called with the child's end of the pipe, then the arguments


def main() -> None:
    """Serves the requests (what, argument) of one process until it is gone."""
    pipe = Connection(int(sys.argv[1]))
    current_process().authkey = pipe.recv()  # tensors cross a pipe as handles, asked for with it
    for name in BEFORE:
        importlib.import_module(name)
    # as in the tests' own process, before gaf is imported
    sys.modules["jaxtyping"].install_import_hook("gaf", "typechecker.check")
    for name in AFTER:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    serve = {"import": import_all, "poll": poll}
    with contextlib.suppress(EOFError):
        while True:
            what, argument = pipe.recv()
            pipe.send(fork(pipe) if what == "fork" else serve[what](argument))


def import_all(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)


def poll(pid: int) -> int | None:
    """The exit code of a child that has ended; a second time, None as for one that runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def fork(pipe: Connection) -> int:
    """The number of a new child, which gets its end of a pipe and then its task over it."""
    handle = reduction.recv_handle(pipe)
    if pid := os.fork():
        os.close(handle)
        return pid
    pipe.close()
    code = 1
    try:
        own = Connection(handle)
        target, args = own.recv()
        target(own, *args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread of torch's process groups could abort an orderly exit


def run_program(pipe: Connection, words: list[str], out: Path, environment: dict) -> None:
    """As `python WORDS > out 2>&1` in a process group of its own, which takes Ctrl-C."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.modules["jaxtyping"].config.update("jaxtyping_disable", True)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Child:
    """A forked process."""

    def __init__(self, warm: "Warm", pid: int, pipe: Connection) -> None:
        self.warm, self.pid, self.pipe = warm, pid, pipe
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.warm.ask("poll", self.pid)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, which: int, group: bool = False) -> None:
        """group: to all processes of its process group."""
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, which)

    def kill(self, group: bool = False) -> None:
        self.send_signal(signal.SIGKILL, group)


class Program(Child):
    """A command. out: where all that it prints goes."""

    out: Path

    def text(self) -> str:
        """What it has printed."""
        return self.out.read_text()

    def finish(self) -> str:
        """Waits for its end; returns what it has printed."""
        self.wait()
        return self.text()


class Warm:
    """The process, started when it is first asked for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pipe: Connection | None = None

    def ask(self, what: str, argument: Any = None) -> Any:
        with self.lock:
            self.started().send((what, argument))
            return self.started().recv()

    def started(self) -> Connection:
        if self.pipe is None:
            self.pipe, there = Pipe()
            command = [sys.executable, "-c", START, str(there.fileno()), *sys.path]
            self.process = subprocess.Popen(command, pass_fds=[there.fileno()])
            there.close()
            self.pipe.send(bytes(current_process().authkey))
        return self.pipe

    def start(self, target: Target, *args: Any, imports: Iterable[str] = ()) -> Child:
        """Forks a process that calls target. imports: modules of all later children."""
        self.ask("import", tuple(imports))
        here, there = Pipe()
        with self.lock:
            to = self.started()
            to.send(("fork", None))
            reduction.send_handle(to, there.fileno(), self.process.pid)
            there.close()  # else the end of the process would not end the pipe
            pid = to.recv()
        here.send((target, args))
        return Child(self, pid, here)

    def start_program(self, *words: Any, out: Path, **environment: str) -> Program:
        """`python WORDS` without the imports; the tests' type checks are off, as for users."""
        child = self.start(run_program, [str(word) for word in words], out, environment)
        program = Program(self, child.pid, child.pipe)
        program.out = out
        out.touch()
        return program


WARM = Warm()
