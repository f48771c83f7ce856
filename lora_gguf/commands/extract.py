"""The LoRA between two GGUFs: what fine-tuning added to a model, as an adapter of a given rank."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from lora_gguf.adapters.adapter_file import AdapterFile
from lora_gguf.adapters.factoring import Factors, factor, factor_to
from lora_gguf.adapters.lora import EMBEDDING, LoraPair, decode, write_adapter_gguf
from lora_gguf.errors import MismatchError, NumericError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.work import in_threads
from lora_gguf.progress import Progress
from lora_gguf.quants.table import CODECS

CHUNK_BYTES = 16 << 20
ENOUGH = 0.99  # share of a difference's energy that --rank auto keeps
LOW_RANK = 0.8  # share of a difference's energy below which it is hardly that of a fine-tune of the rank


@dataclass(frozen=True)
class Extracted:
    """One tensor that differs: its ``shape``, the norm of the difference over that of the base, and the share of its
    energy kept."""

    name: str
    shape: tuple[int, ...]
    relative_size: float
    kept: float


@dataclass
class Extraction:
    """``tensors`` that became pairs, and ``left_out``: tensors that differ but have no place in an adapter, with the
    reason."""

    architecture: str
    rank: int | None
    n_same: int = 0
    tensors: list[Extracted] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON."""
        tensors = [
            {"name": t.name, "shape": list(t.shape), "relative_size": t.relative_size, "kept": t.kept}
            for t in self.tensors
        ]
        return {
            "architecture": self.architecture,
            "rank": self.rank,
            "n_same": self.n_same,
            "tensors": tensors,
            "left_out": self.left_out,
            "warnings": self.warnings,
        }


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: AdapterFile,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Write the adapter that turns ``base`` into ``tuned``, as nearly as the rank of ``output`` can; where that is
    None, of the rank that keeps 99% of each difference's energy.

    Both are GGUFs of one architecture, of any types: each difference is taken between dequantized weights, so what the
    quantization of either adds is in it. One tensor a thread is in memory at a time. Raises ``MismatchError`` where the
    two are not of one model, ``NumericError`` for NaN and infinity.
    """
    with Base(base) as before, Base(tuned) as after:
        check_alike(before, after)
        found = Extraction(before.architecture, output.rank)
        pairs = extracted(before, after, found, threads, progress)
        inputs = [*before.paths, *after.paths]
        label = after.label
        found.warnings += noise_warnings(found, before, after)
    if not pairs:
        raise MismatchError(
            f"{label}: nothing differs from {printable(Path(base).name)} that an adapter could hold: give the model "
            "before, then the one after"
        )
    metadata: list[tuple[str, object, str]] = [
        ("general.name", Path(output.path).stem, "str"),
        ("general.base_model.count", 1, "u32"),
        ("general.base_model.0.name", printable(Path(base).stem, 100), "str"),
    ]
    write_adapter_gguf(
        output.path, pairs, found.architecture, output.outtype, metadata, force=output.force, inputs=inputs
    )
    return found


def noise_warnings(found: Extraction, before: Base, after: Base) -> list[str]:
    """Return a line where the differences look like rounding rather than training: of quantized weights, and of no low
    rank.
    """
    quantized = [t for t in found.tensors if any(m.tensors[t.name].type.block_size > 1 for m in (before, after))]
    noisy = [t for t in quantized if t.kept < LOW_RANK]
    if not noisy or len(noisy) < len(found.tensors) / 2:
        return []
    return [
        f"of {len(noisy)} quantized tensors rank {found.rank or 'auto'} keeps less than {LOW_RANK:.0%}, such as "
        f"{noisy[0].kept:.0%} of "
        f"{noisy[0].name}: most of the difference is rounding: extract from F16 or BF16 files"
    ]


def check_alike(before: Base, after: Base) -> None:
    """Raise ``MismatchError`` unless the two have the same architecture and tensors of the same shapes."""
    if before.architecture != after.architecture:
        raise MismatchError(
            f"{after.label}: expected a {printable(before.architecture, 40)} model as {before.label} is, found "
            f"{printable(after.architecture, 40)}: give two files of one model"
        )
    shapes = [{name: info.shape for name, info in model.tensors.items()} for model in (before, after)]
    differing = [name for name in shapes[0].keys() & shapes[1].keys() if shapes[0][name] != shapes[1][name]]
    missing = [name for name in shapes[0] if name not in shapes[1]]
    strange = [
        f"{name}: expected {shapes[0][name]}, found {shapes[1].get(name, 'nothing')}"
        for name in sorted(differing + missing)
    ]
    if strange:
        raise MismatchError(
            f"{after.label}: {strange[0]}: give two files of one model", strange if len(strange) > 1 else ()
        )


def extracted(
    before: Base, after: Base, found: Extraction, threads: int | None, progress: Progress | None
) -> list[LoraPair]:
    """Return the pairs of all tensors, in order, and note in ``found`` what became of each.

    Each tensor is one thread's, and BLAS keeps to it: its own threads would wait for each other, spinning.
    """
    pairs = []

    def work(name: str) -> Difference | str | None:
        return difference(name, before, after, found.rank)

    with threadpool_limits(1, "blas"):
        for name, result in in_threads(work, before.tensors, threads):
            if progress:
                progress(before.tensors[name].n_bytes, before.n_bytes, name)
            if result is None:
                found.n_same += 1
            elif isinstance(result, str):
                found.left_out[name] = result
            else:
                found.tensors.append(result.told)
                pairs.append(result.pair)
    return pairs


@dataclass(frozen=True)
class Difference:
    """What fine-tuning added to one tensor, as a pair, and what is told of it."""

    pair: LoraPair
    told: Extracted


def difference(name: str, before: Base, after: Base, rank: int | None) -> Difference | str | None:
    """Return what one tensor has more in ``after``, the reason why that has no place in an adapter, or None for
    nothing.
    """
    if is_same(name, before, after):
        return None
    info = before.tensors[name]
    if why := why_left_out(info, before):
        return why
    old = decode(before.reader_of(name), info)
    delta = decode(after.reader_of(name), after.tensors[name])
    size = float(np.linalg.norm(old))
    np.subtract(delta, old, out=delta)
    del old
    if not np.isfinite(delta).all():
        raise NumericError(f"{after.label}: {name}: NaN or infinity in one of the two files: download it again")
    parts = factored(delta.reshape(-1, *delta.shape[-2:]), rank)
    energy, kept = sum(part.energy for part in parts), sum(part.kept for part in parts)
    if energy == 0:
        return None
    a, b = np.stack([part.a for part in parts]), np.stack([part.b for part in parts])
    pair = LoraPair(name, a, b, 1.0) if delta.ndim == 3 else LoraPair(name, a[0], b[0], 1.0)
    return Difference(pair, Extracted(name, delta.shape, energy**0.5 / size if size else float("inf"), kept / energy))


def factored(matrices: np.ndarray, rank: int | None) -> list[Factors]:
    """Return the factors of each matrix, all of one rank: ``rank``, or the least that keeps enough of every one."""
    if rank is None:
        rank = max(len(factor_to(matrix, ENOUGH).a) for matrix in matrices)
    return [factor(matrix, rank) for matrix in matrices]


def is_same(name: str, before: Base, after: Base) -> bool:
    """Return whether the tensor has the same type and bytes in both files."""
    info, other = before.tensors[name], after.tensors[name]
    if info.type != other.type:
        return False
    n_rows = max(1, CHUNK_BYTES // max(1, info.row_bytes))
    for first in range(0, info.n_rows, n_rows):
        n = min(n_rows, info.n_rows - first)
        if not np.array_equal(before.reader_of(name).read(info, first, n), after.reader_of(name).read(other, first, n)):
            return False
    return True


def why_left_out(info: TensorInfo, base: Base) -> str | None:
    """Return the reason why a tensor's difference has no place in an adapter, or None."""
    if not info.name.endswith(".weight") or len(info.shape) not in (2, 3) or "norm" in info.name:
        return "llama.cpp applies adapters to weight matrices only"
    if info.type.name not in CODECS:
        return f"its type {info.type} cannot be read"
    if info.name == EMBEDDING and "output.weight" not in base.tensors:
        return "embedding and head are one tensor (tied), on which llama.cpp cannot apply an adapter"
    return None
