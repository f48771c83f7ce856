"""A merge by an executor: the bytes and the report of one in threads, whatever is merged, and one line for what goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lora_gguf import api, errors
from lora_gguf.errors import ExecutorError, FileError, IntegrityError, LoraGgufError, NumericError, UsageError
from lora_gguf.files import lazy_array
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.files.output import SUFFIX
from lora_gguf.mapping.accounts import Account, ElsewhereError
from lora_gguf.merging import tasks
from tests import tiny
from tests.common import FIXTURES, smollm2_path
from tests.test_merge import base_and_adapter
from tests.test_reference import NAMES as REFERENCES
from tests.test_reference import REFERENCE
from tests.test_reference import base_gguf as reference_base

PERL = FIXTURES / "perl-adapter"
WAYS = {
    "as it is": {},
    "another type": {"type": "Q8_0"},
    "grown, and split": {"max_growth": 0.05, "max_bytes": 20 << 20},
    "in threads, in little memory": {"threads": 3, "memory": 1 << 20, "rounding": "nearest"},
}


@pytest.fixture(scope="module")
def processes():
    """Two processes that know nothing of this one."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Tasks so small that tiny models make many."""
    monkeypatch.setattr(tasks, "TASK_BYTES", 5000)


class Counting(Executor):
    """An executor that hands on to another, and counts."""

    def __init__(self, pool):
        self.pool, self.n = pool, 0

    def submit(self, function, *arguments):
        self.n += 1
        return self.pool.submit(function, *arguments)


def rounded(value):
    """The sums of a range do not begin where those of a chunk do: their last bits differ."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def assert_same(pool, folder: Path, base, adapters, **options) -> None:
    """A merge by ``pool`` has the bytes and the report of one without."""
    here, there = folder / "here", folder / "there"
    here.mkdir()
    there.mkdir()
    counting, seen = Counting(pool), []
    plain = api.merge(base, adapters, here / "out.gguf", **options)
    spread = api.merge(
        base, adapters, there / "out.gguf", executor=counting, progress=lambda *told: seen.append(told), **options
    )
    assert counting.n > 1 and sorted(os.listdir(here)) == sorted(os.listdir(there))
    for path in here.iterdir():
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name
    one, other = (rounded({**report.as_dict(), "outputs": 0}) for report in (plain, pickle.loads(pickle.dumps(spread))))
    assert one == other
    assert sum(n for n, *_ in seen) == seen[0][1]


@pytest.mark.parametrize("name", tiny.KINDS)
def test_every_kind_of_adapter(tmp_path, processes, name):
    base, folder = tiny.base_of_kind(tmp_path, name)
    assert_same(processes, tmp_path, base, folder)


@pytest.mark.parametrize("name", REFERENCES[::8])
def test_architectures(tmp_path, processes, name):
    base = reference_base(name, tmp_path / "base.gguf")
    assert_same(processes, tmp_path, base, REFERENCE / name / "adapter", base_config=REFERENCE / name)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_merge(tmp_path, processes, monkeypatch, way):
    monkeypatch.setattr(tasks, "TASK_BYTES", 4 << 20)
    assert_same(processes, tmp_path, smollm2_path(), [(PERL, 0.5), FIXTURES / "scales-adapter"], **WAYS[way])


def test_a_mix_with_an_importance_matrix(tmp_path, processes):
    base = tiny.base_gguf(tmp_path, "mixtral")
    with GgufReader(base) as reader:
        importance = {
            info.name: np.random.default_rng(1).uniform(0.1, 9, (*info.shape[:-2], info.n_cols)).astype(np.float32)
            for info in reader.tensors.values()
            if len(info.shape) == 3
        }
    adapter = tiny.TINY / "mixtral" / "adapter"
    assert_same(processes, tmp_path, base, adapter, quantize="q5_0", imatrix=Imatrix("im", importance))


def test_threads_and_foreign_futures(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")

    class Job:  # of submitit, say: no future of Python's
        def __init__(self, future: Future) -> None:
            self.result, self.cancel = future.result, future.cancel

    class Jobs:
        def __init__(self, pool):
            self.pool = pool

        def submit(self, function, *arguments):
            return Job(self.pool.submit(function, *arguments))

    with ThreadPoolExecutor(3) as pool:
        assert_same(pool, tmp_path, base, adapter)
        shutil.rmtree(tmp_path / "here")
        shutil.rmtree(tmp_path / "there")
        assert_same(Jobs(pool), tmp_path, base, adapter)


@pytest.mark.parametrize("executor", [3, "dask", object()])
def test_what_is_no_executor(tmp_path, executor):
    with pytest.raises(UsageError, match="executor: expected an Executor of concurrent.futures"):
        api.merge("base.gguf", "adapter", tmp_path / "out", executor=executor)


class Twice(Executor):
    """Every task runs twice, as where a worker was taken for lost."""

    def __init__(self, pool):
        self.pool = pool

    def submit(self, function, *arguments):
        self.pool.submit(function, *arguments).result()
        return self.pool.submit(function, *arguments)


def test_tasks_may_run_twice(tmp_path, processes):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    assert_same(Twice(processes), tmp_path, base, adapter)


class Failing(Executor):
    """After the second task something happens."""

    def __init__(self, happens):
        self.happens, self.n, self.pool = happens, 0, ThreadPoolExecutor(1)

    def submit(self, function, *arguments):
        self.n += 1
        if self.n == 3:
            self.happens()
        return self.pool.submit(function, *arguments)


def broken_scale(path):
    with GgufReader(path) as reader:
        info = next(iter(reader.tensors.values()))
        position = reader.data_position + info.offset + info.n_bytes - info.row_bytes
    raw = bytearray(path.read_bytes())
    raw[position : position + 2] = b"\xff\x7f"
    path.write_bytes(raw)


def failed(folder, executor, kind, words, **options):
    """The merge ends with the one error, and leaves neither an output nor a temporary file."""
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    before = sorted(os.listdir(folder))
    with pytest.raises(kind, match=words) as caught:
        api.merge(base, adapter, folder / "out.gguf", executor=executor, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert sorted(os.listdir(folder)) == before


def test_the_error_of_a_task_is_the_merges(tmp_path, processes):
    base_and_adapter(tmp_path, "Q4_K")
    broken_scale(tmp_path / "base.gguf")
    failed(tmp_path, processes, NumericError, "row 63: a scale is NaN or infinity: the base is damaged")


def test_a_base_that_changes_meanwhile(tmp_path):
    base, _, _ = base_and_adapter(tmp_path, "Q4_K")
    failed(tmp_path, Failing(lambda: os.utime(base, (1, 1))), IntegrityError, "changed")


def test_an_adapter_that_changes_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_array, "AT_ONCE", -1)
    _, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    failed(tmp_path, Failing(lambda: os.utime(adapter, (1, 1))), IntegrityError, "adapter.gguf: .*changed")


def test_a_task_names_places_and_holds_no_factors(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(tasks, "TASK_BYTES", 8 << 20)
    sizes = []

    class Weighing(Executor):
        def submit(self, function, raw):
            sizes.append(len(raw))
            return processes.submit(function, raw)

    api.merge(smollm2_path(), PERL, tmp_path / "out.gguf", executor=Weighing())
    assert (PERL / "adapter_model.safetensors").stat().st_size > 2e6 and max(sizes) < 200_000, sizes


def test_an_output_that_workers_do_not_see(tmp_path):
    base_and_adapter(tmp_path, "Q4_K")

    def vanish():
        [found] = [path for path in tmp_path.iterdir() if path.name.endswith(SUFFIX)]
        found.unlink()

    failed(tmp_path, Failing(vanish), FileError, "out.gguf: cannot open what is under way to it: No such file")


def test_a_worker_that_dies(tmp_path):
    base_and_adapter(tmp_path, "Q4_K")
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os.getpid).result()

        class Killing(Executor):
            def submit(self, function, *arguments):
                return pool.submit(os._exit, 3)

        failed(tmp_path, Killing(), ExecutorError, "the executor failed: BrokenProcessPool: .*run again")


def test_work_that_is_given_up(tmp_path):
    base_and_adapter(tmp_path, "Q4_K")

    class Idle(Executor):
        def submit(self, function, *arguments):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    failed(tmp_path, Idle(), ExecutorError, "gave the work up")


def test_a_worker_of_another_version(tmp_path, monkeypatch):
    base_and_adapter(tmp_path, "Q4_K")
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(tasks, "__version__", "9.9")
        failed(tmp_path, pool, ExecutorError, "a worker has lora-gguf 9.9, the caller 0")


def test_a_worker_on_another_machine_says_where(tmp_path, monkeypatch):
    base_and_adapter(tmp_path, "Q4_K")
    broken_scale(tmp_path / "base.gguf")
    real = tasks.tasks_of

    def planned(*arguments):
        monkeypatch.setattr(tasks, "machine", lambda: "here")
        found = list(real(*arguments))
        monkeypatch.setattr(tasks, "machine", lambda: "there")
        return found

    monkeypatch.setattr("lora_gguf.commands.merge.tasks_of", planned)
    with ThreadPoolExecutor(1) as pool:
        failed(tmp_path, pool, NumericError, "^on .*: base.gguf: .*row 63")


def test_what_progress_raises_ends_the_merge(tmp_path):
    base_and_adapter(tmp_path, "Q4_K")

    def stop(*_told):
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        failed(tmp_path, pool, KeyboardInterrupt, "^$", progress=stop)


def test_a_stale_file_of_a_dead_caller_is_removed(tmp_path, processes):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    for number in ("99", "9912345678901234"):
        (tmp_path / f".out.gguf.{number}{SUFFIX}").write_bytes(b"x")
    api.merge(base, adapter, tmp_path / "out.gguf", executor=processes)
    assert sorted(os.listdir(tmp_path)) == ["adapter.gguf", "base.gguf", "out.gguf"]


def open_files():
    return {os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="nothing tells what is open")
def test_files_are_closed_when_no_task_comes(tmp_path, monkeypatch):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    monkeypatch.setattr(lazy_array, "AT_ONCE", -1)
    api.merge(base, adapter, tmp_path / "out.gguf")
    assert not {str(base), str(adapter)} & open_files()
    monkeypatch.setattr(tasks, "IDLE_SECONDS", 0.2)
    with ThreadPoolExecutor(2) as pool:
        api.merge(base, adapter, tmp_path / "out.gguf", executor=pool, force=True)
        assert str(base) in open_files()
        until = time.monotonic() + 20
        while {str(base), str(adapter)} & open_files():
            assert time.monotonic() < until
            time.sleep(0.05)


def _subclasses(kind):
    return [kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))]


@pytest.mark.parametrize("kind", _subclasses(LoraGgufError), ids=lambda kind: kind.__name__)
def test_errors_travel(kind):
    sent = kind("one line", [Account("a", "error")]) if kind is ElsewhereError else kind("one line", ["a", "b"])
    found = pickle.loads(pickle.dumps(sent))
    assert type(found) is kind and str(found) == "one line" and vars(found) == vars(sent)
    assert found.exit_code == sent.exit_code


def test_exit_codes_differ():
    found = [
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraGgufError)
    ]
    assert len(found) == len(set(found)) == 11
