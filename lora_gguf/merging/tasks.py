"""The work of a merge as tasks that any process can do, on this machine or another, and twice if need be.

A task holds ranges of rows, with what is added to them, and says by path where the base and the output under way lie.
It is carried out by the code that a merge in threads runs, writes its own bytes of the output and returns its sums.
Whoever planned the merge makes the file, hands out the tasks by an executor of ``concurrent.futures``, and puts the
file in place.
"""

from __future__ import annotations

import contextlib
import pickle
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lora_gguf import __version__
from lora_gguf.errors import ExecutorError, IntegrityError, LoraGgufError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.gguf_writer import GgufPlaces, GgufWriter
from lora_gguf.files.input_file import FileState
from lora_gguf.files.lazy_array import close_files
from lora_gguf.files.output import SharedOutput
from lora_gguf.merging.chunks import Range
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.options import Resources
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.work import Done, merge_ranges

TASK_BYTES = 64 << 20  # of the base or of the output, whichever is more: half a second's work or more
BASES = 4  # that a process holds open, for tasks of several merges
IDLE_SECONDS = 30.0  # after which it closes them


@dataclass(frozen=True)
class Task:
    """Ranges of rows of one output: what they are made of, by path, and where they go.

    ``temporary`` is the file under way to what is called ``label``, ``targets`` the tensors' places after its
    ``data_position``. ``machine`` is that of the caller, '' if not known.
    """

    base: tuple[FileState, ...]
    ranges: Sequence[Range]
    temporary: str
    label: str
    data_position: int
    targets: dict[str, TensorInfo]
    resources: Resources
    machine: str
    version: str = __version__


def tasks_of(tensors: Iterable[TensorPlan], base: Base, writer: GgufWriter, resources: Resources) -> Iterator[Task]:
    """Yield the tasks that together are one output file."""
    output, own = writer.output, replace(resources, executor=None, threads=resources.threads or 1)
    for ranges in _batches(tensors):
        names = {part.tensor.target.name for part in ranges}
        targets = {name: writer.tensors[name] for name in names}
        where = str(output.temporary), output.label, writer.data_position, targets
        yield Task(base.states, ranges, *where, own, machine())


def _batches(tensors: Iterable[TensorPlan]) -> Iterator[list[Range]]:
    """Yield the rows of all tensors in ranges of about ``TASK_BYTES``; small tensors are taken together."""
    batch, left = list[Range](), TASK_BYTES
    for tensor in tensors:
        row_bytes = max(tensor.source.row_bytes, tensor.target.row_bytes, 1)
        first, n_rows = 0, tensor.target.n_rows
        while first < n_rows:
            n = min(n_rows - first, max(1, left // row_bytes))
            batch.append(Range(tensor, first, n))
            first, left = first + n, left - n * row_bytes
            if left < row_bytes:
                yield batch
                batch, left = [], TASK_BYTES
    if batch:
        yield batch


def run(raw: bytes) -> list[Done]:
    """Carry out the ``Task`` that is pickled in ``raw``; what was done, chunk by chunk.

    Raises the ``LoraGgufError`` of a merge, and ``ExecutorError`` where this process has another version of lora-gguf.
    """
    task: Task = pickle.loads(raw)  # noqa: S301  # of our own caller
    here = machine()
    elsewhere = not here or here != task.machine
    try:
        return _run(task, sync=elsewhere)
    except LoraGgufError as error:
        if elsewhere:
            error.args = (f"on {printable(platform.node(), 60)}: {error}",)
        raise


def _run(task: Task, *, sync: bool) -> list[Done]:
    if task.version != __version__:
        raise ExecutorError(
            f"a worker has lora-gguf {__version__}, the caller {printable(task.version, 40)}: install the same on both"
        )
    base = _opened(task.base)
    _close_later()
    with SharedOutput(task.temporary, task.label, sync=sync) as output:
        places = GgufPlaces(output, task.data_position, task.targets)
        done = list(merge_ranges(task.ranges, base, places, weigher(base), task.resources))
    base.check_unchanged()
    return done


@lru_cache(maxsize=BASES)
def _opened(states: tuple[FileState, ...]) -> Base:
    """Return the base of these files, opened once for all tasks. Raises ``IntegrityError`` where they changed."""
    base = Base(states[0].path)
    if base.states != states:
        raise IntegrityError(f"{base.label}: changed after the merge was planned: run again when nothing writes to it")
    return base


def _close_later() -> None:
    """Close base and adapter where no task comes for a while: a deleted file takes room as long as it is open."""
    global _timer  # noqa: PLW0603
    if _timer:
        _timer.cancel()
    _timer = threading.Timer(IDLE_SECONDS, close_all)
    _timer.daemon = True
    _timer.start()


def close_all() -> None:
    """Close what tasks have opened and none has in hand."""
    _opened.cache_clear()
    close_files()


_timer: threading.Timer | None = None


def in_executor(executor: Executor, tasks: Iterable[Task], told: Callable[[Done], None]) -> list[Done]:
    """Return what was done by ``tasks``, in order; ``told`` hears of each chunk when its task is done.

    Raises the first error that a task ends with, and ``ExecutorError`` where the executor itself gives up. Then what
    has not begun is cancelled.
    """
    futures: list[Future[list[Done]]] = []
    try:
        for task in tasks:
            raw = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
            with _one_line():
                futures.append(executor.submit(run, raw))
        # not all that calls itself an executor has Python's futures: theirs are taken in turn
        is_standard = all(isinstance(future, Future) for future in futures)
        for future in as_completed(futures) if is_standard else futures:
            for done in _outcome(future):
                told(done)
        return [done for future in futures for done in _outcome(future)]
    finally:
        for future in futures:
            future.cancel()


def _outcome(future: Future[list[Done]]) -> list[Done]:
    with _one_line():
        return future.result()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn whatever an executor raises, but for the errors of a merge, into an ``ExecutorError``."""
    try:
        yield
    except LoraGgufError:
        raise
    except CancelledError as error:
        raise ExecutorError(f"the executor gave the work up: {AGAIN}") from error
    except Exception as error:
        what = printable(f"{type(error).__name__}: {error}".rstrip(": "), 300)
        raise ExecutorError(f"the executor failed: {what}: {AGAIN}") from error


AGAIN = "see that its scheduler and workers live and have lora-gguf, and run again"


@lru_cache(maxsize=1)
def machine() -> str:
    """Return what tells this machine, since its start, from all others; '' where the system has no such thing."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
