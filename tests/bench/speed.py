"""How fast: every figure beside something measured in the same run.

    python -m tests.bench.speed [--shapes 1B,7B] [--json FILE]

Prints tables; --json writes the same figures. On a processor with AVX-512 the kernels' rates and the merges of 1B are
measured with AVX2 too. Bases are generated (random weights, real shapes) in a temporary folder
here. The 70B's base is a sparse file, its merged file and the copy of it (40 GB each, one after the other) are not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_gguf.cli.tables import text_table
from lora_gguf.files.gguf_reader import GgufReader
from tests.bench.shapes import LLAMA_1B, LLAMA_7B, LLAMA_70B, TINY, Shape, write_adapter, write_base
from tests.common import DEMO_ADAPTER, gemma3_path, smollm2_path

SHAPES = {"1B": LLAMA_1B, "7B": LLAMA_7B, "70B": LLAMA_70B}
FRESH = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
    "NVFP4", "Q1_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
)  # fmt: skip
KEPT = (
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
AVX2 = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}
LARGE = 7.0  # times the adapter's own scale: its update is then 0.4 of a Q4_K step, 1.7 of a Q6_K step


class Way(NamedTuple):
    """A way to merge: with which rounding, in how many threads, with AVX2 only, at which scale of the adapter."""

    rounding: str
    threads: int
    narrow: bool = False
    scale: float = 1.0


WAYS = [Way("auto", 1), Way("auto", 2), Way("dither", 1), Way("dither", 2)]
FEWER = {"7B": {"repeat": 2}, "70B": {"repeat": 1, "ways": [Way("auto", 2)]}}  # minutes each


def processor() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {vectors()}"


def vectors() -> str:
    """The widest vectors that kernels here are compiled for."""
    from numba import config
    from numba.core.registry import cpu_target

    features = config.CPU_FEATURES
    if features is None:
        features = cpu_target.target_context.codegen()._get_host_cpu_features()
    wide = "+avx512f" in features
    return "AVX-512" if wide else "AVX2" if config.CPU_NAME or "+avx2" in features else "neither AVX-512 nor AVX2"


def timed(function, repeat: int = 3) -> float:
    """The least CPU time of ``repeat`` runs, in seconds: what else the machine does counts little."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def measured(*command: object, env: dict | None = None) -> tuple[float, float, float]:
    """Wall time in s, CPU time in s and peak RSS in MB of a Python with the arguments ``command``.

    A small process starts it: a child counts the memory that its parent had.
    """
    code = (
        "import resource, subprocess, sys, time; start = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
    )
    words = [sys.executable, "-c", code, sys.executable, *map(str, command)]
    out = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})}).stdout
    wall, used, rss = map(float, out.split())
    return wall, used, rss


def run_cli(*arguments: object, env: dict | None = None) -> tuple[float, float, float]:
    """``measured`` of ``lora-gguf`` with ``arguments``."""
    return measured("-m", "lora_gguf", *arguments, env=env)


def interpreter_rss() -> float:
    """Peak RSS in MB of a Python that has imported what a merge imports and done nothing."""
    return measured("-c", "import numba, numpy")[2]


def copy_and_sync(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", "--sparse=never", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    elapsed = time.perf_counter() - start
    target.unlink()
    return elapsed


def forget(path: Path) -> None:
    """Drop what memory holds of a file, so that it is read from the disk again."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def straightforward(base: Path, adapter: Path, n_layers: int) -> float:
    """Weights a second of CPU time of libgguf dequantize, numpy B@A, libgguf quantize, in two threads, on the first
    layers.
    """
    from libgguf import dequantize_rows, quantize_rows

    from lora_gguf.adapters.lora import read_adapter_gguf

    pairs = [pair for pair in read_adapter_gguf(adapter)[0] if int(pair.name.split(".")[1]) < n_layers]
    with GgufReader(base) as reader:

        def one(pair) -> int:
            info = reader.tensors[pair.name]
            weights = dequantize_rows(reader.read(info), info.type.id, n_per_row=info.n_cols)
            quantize_rows(weights + pair.delta(), info.type.id)
            return info.n_elements

        start = time.process_time()
        with ThreadPoolExecutor(2) as pool:
            n_weights = sum(pool.map(one, pairs))
        return n_weights / (time.process_time() - start)


def tiny(folder: Path) -> tuple[Path, Path]:
    """A base and an adapter of next to nothing."""
    base, adapter = folder / "tiny.gguf", folder / "tiny-lora.gguf"
    write_base(base, TINY)
    write_adapter(adapter, TINY)
    return base, adapter


def start_seconds(folder: Path) -> float:
    """The CPU time of a merge of next to nothing: what every merge spends on Python's and Numba's start."""
    return min(merged(folder, *tiny(folder), Way("auto", 1))[1] for _ in range(3))


def merge_rows(
    folder: Path,
    name: str,
    base: Path,
    adapter: Path,
    n_weights: int,
    own: float,
    start: float,
    ways=WAYS,
    repeat: int = 3,
) -> list[dict]:
    """Merges by each of ``ways``, and copies of the base between them: the fastest of ``repeat``
    runs each, with the base in memory; then one of each that reads it from the disk.
    """
    runs: dict[object, list[tuple[float, float, float]]] = {}
    for from_disk in [False] * repeat + [True]:
        for way in (None, *ways):
            if from_disk:
                forget(base)
            run = (
                (copy_and_sync(base, folder / "out.gguf"), 0.0, 0.0)
                if way is None
                else merged(folder, base, adapter, way)
            )
            runs.setdefault((from_disk, way), []).append(run)
    fastest = {key: min(found) for key, found in runs.items()}
    copied, copied_cold = fastest[False, None][0], fastest[True, None][0]
    rows = []
    for way in ways:
        (wall, used, rss), (wall_cold, *_), n = fastest[False, way], fastest[True, way], way.threads
        rows.append({
            "base": name, "rounding": way.rounding, "threads": n, "vectors": "AVX2" if way.narrow else vectors(),
            "scale": way.scale, "seconds": wall, "cp_fsync_seconds": copied, "times_cp": wall / copied,
            "from_disk_seconds": wall_cold, "from_disk_cp_fsync_seconds": copied_cold, "from_disk_times_cp": wall_cold / copied_cold,
            "mw_s_core": n_weights / wall / n / 1e6, "mw_cpu_s": n_weights / used / 1e6,
            "mw_cpu_s_after_start": n_weights / (used - start) / 1e6, "rss_above_interpreter_mb": rss - own,
        })  # fmt: skip
    return rows


def merged(folder: Path, base: Path, adapter: Path, way: Way) -> tuple[float, float, float]:
    """``measured`` of a merge, whose output is removed again."""
    out, env = folder / "out.gguf", AVX2 if way.narrow else None
    options = ("--rounding", way.rounding, "-t", way.threads, "--scale", way.scale)
    figures = run_cli("merge", base, adapter, "-o", out, *options, env=env)
    out.unlink()
    return figures


def merges(folder: Path, shapes: list[str]) -> list[dict]:
    """Kept-grid merges: real files and generated shapes."""
    own, start, rows = interpreter_rss(), start_seconds(folder), []
    for name, path, shape in (
        ("SmolLM2 135M Q4_1", smollm2_path(), Shape(30, 576, 1536, 9, 3, 49152)),
        ("Gemma 3 270M Q4_K_M", gemma3_path(), None),
    ):
        adapter = folder / "adapter.gguf"
        _adapter_for(path, adapter)
        n_weights = shape.n_linear_weights if shape else _linear_weights(path)
        rows += merge_rows(folder, name, path, adapter, n_weights, own, start)
    for label in shapes:
        shape, base, adapter = SHAPES[label], folder / f"{label}.gguf", folder / "adapter.gguf"
        write_base(base, shape, sparse=label == "70B")
        write_adapter(adapter, shape)
        how = {"ways": ways_of_1b()} if label == "1B" else FEWER.get(label, {})
        rows += (
            found := merge_rows(folder, f"{label} Q4_K_M", base, adapter, shape.n_linear_weights, own, start, **how)
        )
        if label == "1B":
            rate = straightforward(base, adapter, n_layers=3)
            for row in found:
                row["times_faster_than_straightforward"] = row["mw_cpu_s"] * 1e6 / rate
        base.unlink()
    return rows


def ways_of_1b() -> list[Way]:
    """Also an adapter whose updates are nearly half as large as a step, and all of it with AVX2 where there is AVX-512."""
    ways = [*WAYS, Way("auto", 2, scale=LARGE), Way("dither", 2, scale=LARGE)]
    return ways + ([way._replace(narrow=True) for way in ways if way.threads == 2] if vectors() == "AVX-512" else [])


def _linears(reader: GgufReader) -> list:
    return [info for name, info in reader.tensors.items() if name.startswith("blk.") and len(info.shape) == 2]


def _linear_weights(path: Path) -> int:
    with GgufReader(path) as reader:
        return sum(info.n_elements for info in _linears(reader))


def _adapter_for(path: Path, adapter: Path, rank: int = 16) -> None:
    """A random adapter on all linear layers of a real file."""
    from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf

    rng = np.random.default_rng(0)
    with GgufReader(path) as reader:
        pairs = [
            LoraPair(
                info.name,
                (rng.normal(size=(rank, info.shape[1])) * 0.02).astype(np.float32),
                (rng.normal(size=(info.shape[0], rank)) * 0.002).astype(np.float32),
                2.0,
            )
            for info in _linears(reader)
        ]
        write_adapter_gguf(adapter, pairs, reader.architecture, "f16", force=True)


def fresh_rates() -> list[dict]:
    """Each type's quantizer on one core, beside ggml's in C on the same data, million weights a second."""
    from libgguf import quantize_rows

    from lora_gguf.quants.ggml import BY_NAME
    from lora_gguf.quants.table import CODECS

    rows, none = [], np.empty(0, np.float32)
    weights = (np.random.default_rng(0).normal(size=(128, 4096)) * 0.02).astype(np.float32)
    importance = np.random.default_rng(1).uniform(0.1, 2, 4096).astype(np.float32)
    for name in FRESH:
        for label, ours, theirs in (("", none, None), (" imatrix", importance, importance)):
            if ours is none and CODECS[name].needs_importance:
                continue
            blocks = np.empty((128, BY_NAME[name].row_bytes(4096)), np.uint8)
            CODECS[name].encode(weights, ours, blocks)
            c = timed(lambda name=name, theirs=theirs: quantize_rows(weights, BY_NAME[name].id, imatrix=theirs))
            mine = timed(lambda name=name, ours=ours, blocks=blocks: CODECS[name].encode(weights, ours, blocks))
            same = bytes(quantize_rows(weights, BY_NAME[name].id, imatrix=theirs)) == blocks.tobytes()
            n = weights.size / 1e6
            rows.append({"type": name + label, "ours": n / mine, "ggml": n / c, "ratio": c / mine, "identical": same})
    return rows


def kept_rates() -> list[dict]:
    """The kept-grid path on one core, from blocks and factors to blocks, million weights a second, by rounding."""
    from libgguf import quantize_rows

    from lora_gguf.kernels.low_rank import low_rank
    from lora_gguf.quants.ggml import BY_NAME
    from tests.chunk_cases import merged, recipe

    rng, rows = np.random.default_rng(0), []
    weights = (rng.normal(size=(64, 4096)) * 0.02).astype(np.float32)
    a, b = rng.normal(size=(16, 4096)).astype(np.float32), (rng.normal(size=(64, 16)) * 1e-4).astype(np.float32)
    delta = np.empty_like(weights)
    for name in KEPT:
        if BY_NAME[name].block_size == 1:
            raw = (
                weights.astype(np.float16).view(np.uint8)
                if name == "F16"
                else (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            )
        else:
            raw = np.frombuffer(bytes(quantize_rows(weights, BY_NAME[name].id)), np.uint8)
        raw = raw.reshape(64, -1)
        row = {"type": name}
        for rounding in ("dither", "auto"):

            def one(how=recipe(name, rounding), raw=raw):
                low_rank(b, a, delta)
                merged(how, raw, delta)

            one()
            row[rounding] = weights.size / 1e6 / timed(one, 5)
        rows.append(row)
    return rows


def starts(folder: Path) -> dict:
    """Start-up times in s, and the header of a 262k-token file."""
    command = ("merge", *tiny(folder), "-o", folder / "o.gguf", "--force")
    conversion = ("convert", DEMO_ADAPTER, "--base", smollm2_path(), "-o", folder / "a.gguf", "--force")
    run_cli(*command)
    warm = min(run_cli(*command)[0] for _ in range(3))
    cold = run_cli(*command, env={"LORA_GGUF_CACHE": str(folder / "cache")})[0]
    return {
        "help": min(run_cli("--help")[0] for _ in range(3)),
        "warm_tiny_merge": warm,
        "cold_tiny_merge": cold,
        "cold_adds": cold - warm,
        "header_262k_tokens": timed(lambda: GgufReader(gemma3_path()).close()),
        "convert": min(run_cli(*conversion)[0] for _ in range(3)),
    }


def show(title: str, rows: list[dict]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{row[k]:.2f}" if isinstance(row.get(k), float) else row.get(k, "") for k in keys] for row in rows]
    print(f"\n{title}\n{text_table(keys, cells)}", flush=True)


def kernels() -> dict[str, list[dict]]:
    """What kernels do a second, one core."""
    return {"fresh": fresh_rates(), "kept": kept_rates()}


def narrow_kernels() -> dict[str, list[dict]]:
    """The same with AVX2 only: Numba asks for the processor when it is imported, so in a process of its own."""
    code = "import json; from tests.bench.speed import kernels; print(json.dumps(kernels()))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, **AVX2})
    return json.loads(out.stdout.splitlines()[-1])


def show_kernels(found: dict[str, list[dict]], width: str) -> None:
    show(f"quantizers (fresh), one core, {width}, million weights a second", found["fresh"])
    show(f"kept grid, rank 16, one core, {width}, million weights a second", found["kept"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1B,7B", help="generated bases: 1B, 7B, 70B")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, object] = {"processor": processor()}
    print(figures["processor"])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        figures["starts"] = [starts(Path(folder))]
        show("start-up, s", figures["starts"])
        figures |= (found := kernels())
        show_kernels(found, vectors())
        if vectors() == "AVX-512":
            figures["AVX2"] = narrow_kernels()
            show_kernels(figures["AVX2"], "AVX2")
        figures["merges"] = merges(Path(folder), [shape for shape in options.shapes.split(",") if shape])
        show("merges of all linear layers, rank 16", figures["merges"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
