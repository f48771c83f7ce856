"""The command line in a process of its own, soon: forked from one that has everything imported and compiled.

``python -m tests.forked`` reads requests from stdin, a line of JSON each, and answers each with a line. A request may
ask for a fault: the Nth call of the system, counted over all of ``CALLS``, fails, is cut short, or is met by a
signal.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.common import ROOT

CALLS = (
    "open", "close", "pread", "preadv", "read", "pwrite", "write", "fsync", "ftruncate", "copy_file_range", "link", "replace", "rename",
    "unlink", "mkdir", "stat", "lstat", "fstat", "statvfs", "scandir", "listdir", "access", "readlink",
)  # fmt: skip
SHORTENED = {
    "pread": 1,
    "preadv": 1,
    "read": 1,
    "pwrite": 1,
    "write": 1,
    "copy_file_range": 2,
}  # call -> its argument with the bytes
LIMITS = {"files": resource.RLIMIT_NOFILE, "size": resource.RLIMIT_FSIZE, "memory": resource.RLIMIT_AS}


@dataclass
class Result:
    """How a run ended: ``code`` as a shell sees it, None where it had to be killed; ``calls`` are those that it made.

    ``seconds`` are those of its processor, so that they mean the same on a busy machine.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    peak_bytes: int
    calls: list[str] = field(default_factory=list)


class Forge:
    """The process that forks. A context manager; ``run`` and ``warm`` take the arguments of ``lora-gguf``."""

    def __init__(self, env: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_exc) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def _ask(self, **request) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def warm(self, *arguments, cwd) -> None:
        """Run a command in the forking process itself, so that its forks find all of it loaded."""
        result = Result(**self._ask(arguments=list(map(str, arguments)), warm=True, cwd=str(cwd)))
        assert result.code == 0, arguments

    def run(self, *arguments, fault=None, limits=None, timeout: float = 20.0, cwd=None, env=None, stdio=None) -> Result:
        """``fault`` is (N, what): an error's name, "short", or a signal's name; ``stdio`` maps 1 or 2 to a path, or
        None to close it.

        ``limits``: open "files", bytes of "size" of a file, megabytes of "memory" more than there are at the start.
        """
        request = {
            "fault": fault,
            "limits": limits or {},
            "timeout": timeout,
            "cwd": str(cwd) if cwd else None,
            "env": env or {},
        }
        return Result(**self._ask(arguments=list(map(str, arguments)), stdio=stdio or {}, **request))


class Fault:
    """Counts the calls of the system that this process makes through Python, and interferes with the Nth (from 0)."""

    def __init__(self, number: int | None, what: str | None, log: mmap.mmap):
        self.number, self.what, self.log, self.count, self.lock = number, what, log, 0, threading.Lock()

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        builtins.open = io.open = self.wrapped("open", io.open)
        fcntl.flock = self.wrapped("flock", fcntl.flock)

    def wrapped(self, name: str, real):
        def call(*args, **kwargs):
            with self.lock:
                number, self.count = self.count, self.count + 1
                self.log.write(f"{name}\n".encode())
            if number == self.number:
                args = self.interfere(name, args)
            return real(*args, **kwargs)

        return call

    def interfere(self, name: str, args: tuple) -> tuple:
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what != "short":
            code = getattr(errno, self.what)
            raise OSError(code, os.strerror(code))
        elif name in SHORTENED:
            at = SHORTENED[name]
            return (*args[:at], halved(args[at]), *args[at + 1 :])
        return args


def halved(amount):
    """Half of a number of bytes, of a buffer, or of a list of one buffer; at least one byte."""
    if isinstance(amount, int):
        return max(1, amount // 2)
    if isinstance(amount, (list, tuple)):
        return [halved(amount[0])]
    return memoryview(amount)[: max(1, len(amount) // 2)]


def _run_main(arguments: list[str]) -> int:
    """The exit code of the command line, its output flushed as the interpreter does at its end."""
    from lora_gguf.cli import main

    sys.argv = ["lora-gguf", *arguments]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException as error:
        print(f"Traceback: {error!r} came out of main", file=sys.stderr)
        code = 1
    try:
        print(end="", flush=True)
    except OSError as error:
        print(f"Traceback: {error!r} at the interpreter's end", file=sys.stderr)
        return 120
    return code


def _child(request: dict, pipes: list[int], log: mmap.mmap) -> None:
    for number, pipe in zip((1, 2), pipes):
        os.dup2(pipe, number)
        path = request["stdio"].get(str(number), "")
        if path:
            os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", write_through=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if request["stdio"].get(str(number), "") is None:  # as Python finds it when it starts
            setattr(sys, name, None)
            os.close(number)
    if request["cwd"]:
        os.chdir(request["cwd"])
    os.environ.update(request["env"])
    time.sleep = lambda _seconds: None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
    Fault(*(request["fault"] or (None, None)), log).install()
    for name, value in request["limits"].items():
        value = value * 10**6 + _virtual_bytes() if name == "memory" else value
        resource.setrlimit(LIMITS[name], (value, value))
    os._exit(_run_main(request["arguments"]))


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _wait(pid: int, timeout: float) -> tuple[int | None, resource.struct_rusage]:
    started = time.monotonic()
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() - started > timeout:
            os.kill(pid, signal.SIGKILL)
            return None, os.wait4(pid, 0)[2]
        time.sleep(0.002)


def _answer(request: dict) -> dict:
    if request.get("warm"):
        saved = os.dup(1)
        os.dup2(2, 1)
        os.chdir(request["cwd"])
        code = _run_main(request["arguments"])
        os.dup2(saved, 1)
        os.close(saved)
        return vars(Result(code, "", "", 0.0, 0))
    pipes, log = [os.pipe() for _ in range(2)], mmap.mmap(-1, 1 << 20)
    for _, writing in pipes:
        fcntl.fcntl(writing, 1031, 1 << 20)  # F_SETPIPE_SZ: nobody reads before the end
    pid = os.fork()
    if not pid:
        _child(request, [writing for _, writing in pipes], log)
    code, usage = _wait(pid, request["timeout"])
    texts = []
    for reading, writing in pipes:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            texts.append(pipe.read().decode("utf-8", "backslashreplace"))
    calls = log[: log.find(b"\0")].decode().split()
    log.close()
    return vars(Result(code, *texts, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, calls))


def main() -> None:
    import lora_gguf.cli  # noqa: F401

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """What lies in ``folder`` and below: the bytes of files, the kind of all else."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "link" if path.is_symlink() else "other"
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


if __name__ == "__main__":
    main()
