"""How a merge goes over a cluster: one, two and four workers of a real Dask cluster on this machine.

    python -m tests.bench.scale [--shapes 7B,70B] [--json FILE]

Prints tables; --json writes the same figures. Bases of real shapes are made in a temporary folder here. That of 70B is
a sparse file, of which one shard of 2 GB is merged, its ranges as any. What each process reads, writes and is sent is
measured, and compared with what the model of cost says; the model then tells of 100 workers and a file of 400 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import tempfile
import time
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

from distributed import Client

from lora_gguf import api
from lora_gguf.cli.tables import text_table
from lora_gguf.merging.tasks import TASK_BYTES
from tests.bench.shapes import LLAMA_1B, LLAMA_7B, LLAMA_70B, TINY, write_adapter, write_base
from tests.cluster import Cluster, cluster

SHAPES = {"1B": LLAMA_1B, "7B": LLAMA_7B, "70B": LLAMA_70B}
SHARD = {"max_bytes": 2_000_000_000, "shard": "5/22"}
WORKERS = (1, 2, 4)
SAMPLED = 3 << 19  # bytes of the base that a task samples to tell its columns' importance, or less


class Measured(Executor):
    """Dask's executor, and the bytes of what goes to its tasks and comes back."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.n, self.sent, self.futures = executor, 0, 0, []

    def submit(self, function, raw):
        self.n, self.sent = self.n + 1, self.sent + len(raw)
        self.futures.append(self.executor.submit(function, raw))
        return self.futures[-1]

    @property
    def returned(self) -> int:
        return sum(len(pickle.dumps(future.result())) for future in self.futures)


@dataclass
class Cost:
    """Of one worker, in bytes: what it reads and writes, and what is sent to it and by it; and how many tasks it has."""

    tasks: float
    read: float
    written: float
    sent: float
    returned: float


def expected(n_workers: int, n_bytes: int, adapter_bytes: int, sent: float, returned: float) -> Cost:
    """The model: every byte of the base is read and written once, and the adapter about once; a task further samples the
    base and takes ``sent`` and ``returned`` bytes.
    """
    n = n_bytes / TASK_BYTES / n_workers
    read = (n_bytes + adapter_bytes) / n_workers + n * SAMPLED
    return Cost(n, read, n_bytes / n_workers, n * sent, n * returned)


def io_of(pid: int) -> tuple[int, int]:
    """What a process has read and written so far, in bytes."""
    text = Path(f"/proc/{pid}/io").read_text()
    return tuple(int(re.search(rf"{name}: (\d+)", text)[1]) for name in ("rchar", "wchar"))


def cpu_of(pid: int) -> float:
    """The CPU time that a process has taken so far, in s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid: int) -> float:
    """The most memory that a process had, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def warm_up(folder: Path, client: Client, n_workers: int) -> None:
    """Let every worker load the kernels."""
    base, adapter = folder / "tiny.gguf", folder / "tiny-lora.gguf"
    write_base(base, TINY)
    write_adapter(adapter, TINY)
    address = list(client.scheduler_info(n_workers=-1)["workers"])
    for worker in address:
        api.merge(
            base,
            adapter,
            folder / "tiny-out.gguf",
            executor=client.get_executor(workers=[worker], pure=False),
            force=True,
        )
    assert len(address) == n_workers


def one(folder: Path, found: Cluster, base: Path, adapter: Path, label: str) -> dict:
    """A merge by the cluster as it is: its seconds, the memory of all processes, and what a worker reads and writes."""
    pids = [worker.pid for worker in found.workers]
    out = {"70B": SHARD}.get(label, {})
    with Client(found.address, set_as_default=False) as client:
        warm_up(folder, client, len(pids))
        executor, before = Measured(client.get_executor(pure=False)), [io_of(pid) for pid in pids]
        used, start, own = [cpu_of(pid) for pid in pids], time.perf_counter(), time.process_time()
        report = api.merge(base, adapter, folder / "out.gguf", executor=executor, force=True, **out)
        seconds, own = time.perf_counter() - start, time.process_time() - own
        used = [cpu_of(pid) - before for before, pid in zip(used, pids)]
        moved = [[b - a for a, b in zip(first, io_of(pid))] for first, pid in zip(before, pids)]
        sent, returned = executor.sent / executor.n, executor.returned / executor.n
    n_bytes = sum(tensor.target.n_bytes for tensor in report.tensors)
    share = n_bytes / base.stat().st_size
    model = expected(len(pids), n_bytes, int(adapter.stat().st_size * share), sent, returned)
    for path in report.written:
        path.unlink()
    return {
        "base": label, "workers": len(pids), "tasks": executor.n, "seconds": seconds, "worker_cpu_s": max(used), "caller_cpu_s": own, "gb": n_bytes / 1e9,
        "read_gb": max(read for read, _ in moved) / 1e9, "read_mean_gb": sum(read for read, _ in moved) / len(moved) / 1e9,
        "model_read_gb": model.read / 1e9, "written_mean_gb": sum(wrote for _, wrote in moved) / len(moved) / 1e9,
        "model_written_gb": model.written / 1e9, "task_kb": sent / 1e3, "result_kb": returned / 1e3,
        "worker_rss_mb": max(map(peak_of, pids)), "scheduler_rss_mb": peak_of(found.scheduler.pid),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="7B,70B", help="generated bases: 1B, 7B, 70B")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        for label in options.shapes.split(","):
            base, adapter = folder / f"{label}.gguf", folder / f"{label}-lora.gguf"
            write_base(base, SHAPES[label], sparse=label == "70B")
            write_adapter(adapter, SHAPES[label])
            for i, n in enumerate(map(int, options.workers.split(","))):
                with cluster(folder / f"{label}-{i}", n) as found:
                    rows.append(one(folder, found, base, adapter, label))
            base.unlink()
    show("merges by a cluster on this machine, rank 16; of a worker the mean, where it says so", rows)
    last = rows[-1]
    cost = expected(100, 400_000_000_000, 4_000_000_000, last["task_kb"] * 1e3, last["result_kb"] * 1e3)
    paper = {key: value / (1 if key == "tasks" else 1e9) for key, value in asdict(cost).items()}
    show("on paper: 100 workers, a file of 400 GB, an adapter of 4 GB; of each worker, GB", [paper])
    if options.json:
        options.json.write_text(json.dumps({"merges": rows, "paper": paper}, indent=1))


def show(title: str, rows: list[dict]) -> None:
    cells = [[f"{value:.3g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    print(f"\n{title}\n{text_table(list(rows[0]), cells)}", flush=True)


if __name__ == "__main__":
    main()
