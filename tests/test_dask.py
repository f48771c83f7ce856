"""A real Dask cluster merges one file: the bytes of a plain merge, whoever is killed on the way, also over a network."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from lora_gguf import api
from lora_gguf.errors import ExecutorError, NumericError
from lora_gguf.files.output import SUFFIX
from lora_gguf.merging import tasks
from tests import tiny
from tests.cluster import ENVIRONMENT, Cluster, cluster
from tests.common import FIXTURES, ROOT, smollm2_path
from tests.test_executor import broken_scale
from tests.test_merge import base_and_adapter

distributed = pytest.importorskip("distributed")
PERL = FIXTURES / "perl-adapter"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What a merge of SmolLM2 is without a cluster."""
    path = tmp_path_factory.mktemp("plain") / "out.gguf"
    api.merge(smollm2_path(), PERL, path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "TASK_BYTES", 4 << 20)


@contextlib.contextmanager
def connected(found: Cluster):
    with distributed.Client(found.address, timeout=20, set_as_default=False) as client:
        yield client


def run_cli(*arguments, within=(), **more) -> subprocess.Popen:
    return subprocess.Popen(
        [*within, sys.executable, "-m", "lora_gguf", *map(str, arguments)],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def test_one_two_and_four_workers(tmp_path, plain):
    with cluster(tmp_path / "cluster", 1) as found, connected(found) as client:
        for n in (1, 2, 4):
            while len(found.workers) < n:
                found.add_worker()
            client.wait_for_workers(n, timeout=30)
            seen = []
            report = api.merge(
                smollm2_path(), PERL, tmp_path / f"{n}.gguf", executor=client.get_executor(),
                progress=lambda *told: seen.append(told),
            )  # fmt: skip
            assert (tmp_path / f"{n}.gguf").read_bytes() == plain and report.whole.kept > 0.9
            assert sum(done for done, *_ in seen) == seen[0][1]
        assert all(n > 0 for n in client.run(lambda dask_worker: dask_worker.state.executed_count).values())


def test_the_command_line(tmp_path, plain):
    with cluster(tmp_path / "cluster", 2) as found:
        out = tmp_path / "out.gguf"
        process = run_cli("merge", smollm2_path(), PERL, "-o", out, "--dask", found.address, "-q")
        assert process.communicate() == (f"{out}\n", "") and process.returncode == 0
        assert out.read_bytes() == plain


@pytest.mark.parametrize("n_left", [1, 0])
def test_a_worker_killed_in_the_middle(tmp_path, plain, n_left):
    """Another does its tasks; where there is none, the merge waits for one."""
    with cluster(tmp_path / "cluster", 1 + n_left) as found, connected(found) as client:
        killed = []

        def told(*_progress):
            if not killed:
                killed.append(found.workers[-1])
                killed[0].send_signal(signal.SIGKILL)
                killed[0].wait()
                if not n_left:
                    found.add_worker()

        api.merge(smollm2_path(), PERL, tmp_path / "out.gguf", executor=client.get_executor(), progress=told)
        assert killed and (tmp_path / "out.gguf").read_bytes() == plain


def test_the_scheduler_killed(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there")
    with cluster(tmp_path / "cluster", 1) as found, connected(found) as client:
        with pytest.raises(ExecutorError, match="gave the work up: see that its scheduler") as caught:
            api.merge(
                smollm2_path(), PERL, out, executor=client.get_executor(), force=True,
                progress=lambda *_told: found.scheduler.send_signal(signal.SIGKILL),
            )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"what was there" and sorted(os.listdir(tmp_path)) == ["cluster", "out.gguf"]


def test_the_scheduler_killed_under_the_command_line(tmp_path):
    out = tmp_path / "out.gguf"
    with cluster(tmp_path / "cluster", 1) as found:
        found.workers[0].send_signal(signal.SIGSTOP)  # so that the merge is under way, and stays so
        process = run_cli("merge", smollm2_path(), PERL, "-o", out, "--dask", found.address, "-q")
        while not any(name.endswith(SUFFIX) for name in os.listdir(tmp_path)):
            assert process.poll() is None
        found.scheduler.send_signal(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (ExecutorError.exit_code, "")
        assert stderr.startswith("lora-gguf: error: the executor gave the work up") and stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["cluster"]


def test_the_caller_killed(tmp_path, plain):
    """What it leaves, the next run removes."""
    out = tmp_path / "out.gguf"
    with cluster(tmp_path / "cluster", 1) as found:
        found.workers[0].send_signal(signal.SIGSTOP)
        process = run_cli("merge", smollm2_path(), PERL, "-o", out, "--dask", found.address)
        while not any(name.endswith(SUFFIX) for name in os.listdir(tmp_path)):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.workers[0].send_signal(signal.SIGCONT)
        assert len(os.listdir(tmp_path)) == 2 and not out.exists()
        with connected(found) as client:
            api.merge(smollm2_path(), PERL, out, executor=client.get_executor())
    assert out.read_bytes() == plain and sorted(os.listdir(tmp_path)) == ["cluster", "out.gguf"]


def test_the_error_of_a_task_is_the_one_line(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    broken_scale(base)
    with cluster(tmp_path / "cluster", 1) as found:
        process = run_cli("merge", base, adapter, "-o", tmp_path / "out.gguf", "--dask", found.address, "-q")
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (NumericError.exit_code, "")
    assert stderr == (
        "lora-gguf: error: base.gguf: blk.0.ffn_up.weight: row 63: a scale is NaN or infinity: the base is damaged\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["adapter.gguf", "base.gguf", "cluster"]


def test_no_scheduler(tmp_path):
    process = run_cli("merge", smollm2_path(), PERL, "-o", tmp_path / "out.gguf", "--dask", "tcp://127.0.0.1:9", "-q")
    _, stderr = process.communicate()
    assert process.returncode == ExecutorError.exit_code and stderr.count("\n") == 1
    assert "--dask tcp://127.0.0.1:9: no scheduler answers there" in stderr


def test_without_dask(tmp_path, monkeypatch, capsys):
    from lora_gguf.cli import execute

    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["merge", str(smollm2_path()), str(PERL), "-o", str(tmp_path / "o.gguf"), "--dask", "tcp://a:1"]
    assert execute(command) == 4
    _, stderr = capsys.readouterr()
    assert "--dask: expected the package distributed" in stderr and stderr.rstrip().endswith("install distributed")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks():
    """Two networks of their own that meet in a pair of interfaces: what begins a command in each."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("networks of their own want root and the command ip")
    names = [f"lora{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ip netns: {error.stderr.decode().strip()}")
    try:
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ("10.77.0.1/24", "10.77.0.2/24")):
            _ip("-n", name, "addr", "add", address, "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_networks_with_one_folder(tmp_path, plain, networks):
    here, there = networks
    folder = tmp_path / "cluster"
    folder.mkdir()
    found = Cluster(folder, "10.77.0.1")
    try:
        found.start(2, (here, there))
        out = tmp_path / "out.gguf"
        process = run_cli("merge", smollm2_path(), PERL, "-o", out, "--dask", found.address, "-q", within=here)
        assert process.communicate() == (f"{out}\n", "")
    finally:
        found.stop()
    assert out.read_bytes() == plain
    assert "10.77.0.2" in (folder / "worker0.log").read_text()


def test_many_adapters_and_many_bases(tmp_path, monkeypatch, capsys):
    """The script of docs/cluster.md: nothing is made twice, a merge that fails stops no other, nor does a lost worker."""
    script = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in script.splitlines()) <= 11
    bases, adapters = [], []
    for i, type_name in enumerate(("Q4_K", "Q8_0")):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        base, adapter, _ = base_and_adapter(folder, type_name)
        bases.append(str(base.rename(tmp_path / f"base{i}.gguf")))
        adapters.append(str(adapter.rename(tmp_path / f"adapter{i}.gguf")))
    raw = bytearray((tmp_path / "adapter1.gguf").read_bytes())
    raw[-40:] = b"\x01" * 40
    (tmp_path / "adapter1.gguf").write_bytes(raw)
    adapters.append(str(tmp_path / "nowhere.gguf"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()
    with cluster(tmp_path / "cluster", 2) as found:
        lists = f"bases, adapters = {bases}, {adapters}"
        code = re.sub(r"bases, adapters = .*", lists, script).replace("tcp://host:8786", found.address)
        exec(compile(code, "cluster.md", "exec"), {})
        first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
        said = capsys.readouterr().out.splitlines()
        assert len(first) == 4 and len(said) == 6 and sum("nowhere.gguf: no such file" in line for line in said) == 2
        removed = next((tmp_path / "merged").glob("*adapter0*"))
        content = removed.read_bytes()
        removed.unlink()
        found.workers[0].send_signal(signal.SIGKILL)
        exec(compile(code, "cluster.md", "exec"), {})
        second = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    assert {name for name in first if first[name] != second[name]} == {removed.name} and removed.read_bytes() == content


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_pipeline_over_a_cluster(tmp_path):
    folder = tmp_path / "pipeline"
    assert run_cli("init-pipeline", folder).wait() == 0
    for i, name in enumerate(("one", "two")):
        shutil.copytree(tiny.TINY / "llama" / "adapter", folder / "adapters" / name)
        (folder / "models").mkdir(exist_ok=True)
        shutil.copy(tiny.base_gguf(tmp_path, "llama"), folder / "models" / f"Q{i}.gguf")
    with cluster(tmp_path / "cluster", 2) as found:
        variables = ["ADAPTERS=one two", "QUANTS=Q0 Q1", f"MERGE_FLAGS=--dask {found.address} -q"]
        command = [
            "make",
            "-C",
            str(folder),
            "-j2",
            f"LORA_GGUF={sys.executable} -m lora_gguf",
            *variables,
            "merged-files",
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | ENVIRONMENT
        for expected in (4, 0):  # the second time there is nothing to do
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.count("lora_gguf merge") == expected, done.stderr
    api.merge(folder / "models" / "Q0.gguf", folder / "adapters" / "one", tmp_path / "plain.gguf")
    assert (folder / "merged" / "one--Q0.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert len(list((folder / "merged").glob("*.gguf"))) == 4
