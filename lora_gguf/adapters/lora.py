"""The noun that both paths share: a low-rank update of one tensor, in GGUF terms; and adapter GGUFs in and out."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_gguf.errors import MalformedError, NumericError, UnsupportedError, printable
from lora_gguf.files.gguf_reader import GgufReader, TensorInfo
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.lazy_array import LazyArray, Made, Stored, as_stored, blocks_of, contiguous
from lora_gguf.quants.ggml import BY_NAME, GgmlType

OUT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
F16_EXPONENT = 0x7C00
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SHARED = "lora_gguf.shared_embedding"  # that an adapter's embedding is the head too


@dataclass(frozen=True)
class Piece:
    """A part of a Hugging Face weight, and where it goes: a gather of rows and columns, a factor a row, a transpose.

    None means all rows, all columns, no factor; ``transpose`` comes last. The part becomes the GGUF tensor ``name``, or
    the matrix at ``slot`` of its leading axis; with an ``offset`` only the rows from there on. ``shift`` is added to a
    whole weight.
    """

    name: str
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    scale: np.ndarray | None = None
    transpose: bool = False
    slot: int | None = None
    offset: int | None = None
    shift: float = 0.0


@dataclass(eq=False)
class LoraPair:
    """The update ``W += scale * b @ a`` of the GGUF tensor ``name``.

    ``a`` is (r, in) and ``b`` (out, r), f32, or f16 as stored, contiguous, in the layout that the GGUF tensor has; for
    stacked experts both have a leading axis E: (E, r, in) and (E, out, r). ``scale`` is PEFT's: alpha / r, or alpha /
    sqrt(r). ``sources`` are the adapter's tensors that it comes from. In ``adapter.py``, before names and layouts are
    those of GGUF, ``name`` is the path of the Hugging Face module, and ``wide`` says that only the first columns of
    ``a``, as many as the module has, count, ``packed`` that nothing yet tells which axis of packed experts is in or
    out. ``shared``: the embedding's update is the head's too, which is the same tensor.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    sources: tuple[str, ...] = ()
    wide: bool = False
    packed: bool = False
    shared: bool = False

    part = "weight"

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this updates."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def take(self, piece: Piece) -> LoraPair:
        """Return the update of ``piece`` alone, under its name and in its layout: exact, the gathers act on the
        factors.
        """
        a = self.a if piece.cols is None else self.a[..., piece.cols]
        b = self.b if piece.rows is None else self.b[..., piece.rows, :]
        if piece.scale is not None:
            b = (b * piece.scale[:, None]).astype(np.float32)
        if piece.transpose:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        return replace(self, name=piece.name, a=contiguous(a), b=contiguous(b), packed=False)

    def delta(self) -> np.ndarray:
        """Return ``scale * b @ a`` in f32, whole: for tests and small tensors."""
        return np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))


def check_finite(name: str, array: np.ndarray, label: str) -> str | None:
    """Return None, or where the first NaN or infinity of ``array`` stands."""
    for first, block in blocks_of(as_stored(array)):
        # numpy takes three times as long for f16
        is_f16 = block.dtype == np.float16
        finite = (block.view(np.uint16) & F16_EXPONENT) != F16_EXPONENT if is_f16 else np.isfinite(block)
        if not finite.all():
            place = [int(i) for i in np.argwhere(~finite)[0]]
            value = block[tuple(place)]
            return f"{label}: {name}{[place[0] + first, *place[1:]] if place else []} is {value}"
    return None


def common_alpha(pairs: Sequence[LoraPair]) -> float:
    """Return the ``adapter.lora.alpha`` under which most pairs need no change: the loader applies alpha / rank.

    Never zero, which means a scale of 1 to the loader.
    """
    counts = Counter(float(np.float32(pair.scale * pair.rank)) for pair in pairs)
    counts.pop(0.0, None)
    return counts.most_common(1)[0][0] if counts else 1.0


def under_alpha(pair: LoraPair, alpha: float) -> LoraPair:
    """Return ``pair`` with the scale alpha / rank, the rest of its own scale folded into B."""
    scale = alpha / pair.rank
    if math.isclose(pair.scale, scale, rel_tol=1e-6):
        return replace(pair, scale=scale)
    return replace(pair, b=(pair.b * np.float64(pair.scale / scale)).astype(np.float32), scale=scale)


def stored_factors(pair: LoraPair) -> list[tuple[str, np.ndarray]]:
    """Return the two tensors of ``pair`` as they stand in an adapter GGUF; the embedding's are the other way round."""
    a, b = (pair.b, pair.a.T) if pair.name.endswith(EMBEDDING) else (pair.a, pair.b)
    return [(f"{pair.name}.lora_a", contiguous(a)), (f"{pair.name}.lora_b", contiguous(b))]


def stored_type(shape: tuple[int, ...], outtype: str) -> GgmlType:
    """Return ``outtype``, or F16 where a row isn't whole blocks."""
    wanted = BY_NAME[outtype.upper()]
    return wanted if shape[-1] % wanted.block_size == 0 else BY_NAME["F16"]


def smallest_exact(arrays: Sequence[np.ndarray]) -> str:
    """Return the smallest of f16, bf16 and f32 that holds all numbers of ``arrays`` as they are."""
    with np.errstate(over="ignore"):
        if all((np.asarray(array).astype(np.float16) == array).all() for array in arrays):
            return "f16"
    bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) for array in arrays)
    return "bf16" if all(not (found & 0xFFFF).any() for found in bits) else "f32"


def encode(name: str, array: np.ndarray, type: GgmlType) -> np.ndarray:
    """Return the bytes of ``array`` (f32) in ``type``: F32, F16, BF16 or Q8_0. Raises where F16 would overflow."""
    array = np.ascontiguousarray(array, np.float32)
    largest = float(np.abs(array).max(initial=0))
    if not largest <= (65519 if type.name == "F16" else float(np.finfo(np.float32).max)):
        raise NumericError(f"{name}: {largest} is beyond {type}: choose another --outtype, or the adapter is broken")
    if type.name == "F32":
        return array
    if type.name == "F16":
        return array.astype(np.float16)
    from lora_gguf.quants.table import CODECS

    rows = array.reshape(-1, array.shape[-1])
    blocks = np.empty((len(rows), type.row_bytes(rows.shape[1])), np.uint8)
    CODECS[type.name].encode(rows, np.empty(0, np.float32), blocks)
    return blocks


def decode_rows(reader: GgufReader, info: TensorInfo, first: int, n: int) -> np.ndarray:
    """Return ``n`` rows of a tensor of an open file from ``first`` on, as f32."""
    part = replace(info, shape=(n, info.n_cols))
    return decode(reader, part, reader.read(info, first, n))


def decode(reader: GgufReader, info: TensorInfo, raw: np.ndarray | None = None) -> np.ndarray:
    """Return a tensor of an open file as f32, in its shape; ``raw`` are its bytes where they are read already."""
    raw = reader.read(info) if raw is None else raw
    if info.type.name in ("F32", "F16"):
        return raw.view("<f4" if info.type.name == "F32" else "<f2").astype(np.float32).reshape(info.shape)
    check_readable(info, reader.label)
    return _decoded(raw, info.type.name, info.shape)


def write_adapter_gguf(
    path: str | os.PathLike,
    pairs: Sequence[LoraPair],
    architecture: str,
    outtype: str = "f32",
    metadata: Iterable[tuple[str, object, str]] = (),
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Write ``pairs`` as an adapter that llama.cpp loads.

    ``metadata`` are further (key, value, type name) entries. Where one alpha gives every pair its scale, B is written
    as it is; else the remaining factor is folded into B.
    """
    from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value

    alpha = common_alpha(pairs)
    factors = [factor for pair in pairs for factor in stored_factors(under_alpha(pair, alpha))]
    if outtype == "auto":
        outtype = smallest_exact([array for _, array in factors])
    specs = [TensorSpec(name, stored_type(array.shape, outtype), array.shape) for name, array in factors]
    header = [
        key_value("general.architecture", architecture, "str"),
        key_value("general.type", "adapter", "str"),
        key_value("adapter.type", "lora", "str"),
        key_value("adapter.lora.alpha", alpha, "f32"),
        *([key_value(SHARED, True, "bool")] if any(pair.shared for pair in pairs) else []),
        *(key_value(*entry) for entry in metadata),
    ]
    with GgufWriter(path, header, specs, force=force, inputs=inputs) as writer:
        for spec, (name, array) in zip(specs, factors, strict=True):
            writer.write(writer.tensors[spec.name], 0, encode(name, array, spec.type))
        writer.commit()


def read_adapter_gguf(path: str | os.PathLike) -> tuple[list[LoraPair], str]:
    """Return the pairs of an adapter GGUF and its architecture. ``*_norm.weight`` tensors are left out, as llama.cpp
    does.

    Raises ``MalformedError`` for a file that llama.cpp's loader would refuse, ``NumericError`` for NaN and infinity.
    """
    with GgufReader(path) as reader:
        return pairs_of(reader), reader.architecture


def pairs_of(reader: GgufReader) -> list[LoraPair]:
    """Return the pairs of an adapter GGUF that is open. Errors as of ``read_adapter_gguf``."""
    alpha = _adapter_alpha(reader)
    halves = _halves(reader)
    pairs, broken = [], []
    for name, half in halves.items():
        a, b = _factor(reader, half["lora_a"]), _factor(reader, half["lora_b"])
        broken += [
            found
            for key, array in (("lora_a", a), ("lora_b", b))
            if (found := check_finite(f"{name}.{key}", array, reader.label))
        ]
        pairs.append(_pair(reader, name, a, b, alpha))
    if broken:
        raise NumericError(f"{broken[0]}: expected finite numbers: the adapter is broken", broken)
    if not pairs:
        raise MalformedError(f"{reader.label}: expected lora_a and lora_b tensors, found none: not a LoRA adapter")
    if reader.get(SHARED) is True:
        pairs = [replace(pair, shared=pair.name == EMBEDDING) for pair in pairs]
    return pairs


def _factor(reader: GgufReader, info: TensorInfo) -> np.ndarray:
    """The factor as f32, read when it is asked for."""
    file = reader.source
    if not isinstance(file, InputFile):
        return decode(reader, info)
    position = reader.data_position + info.offset
    if info.type.name in ("F32", "F16", "BF16"):
        return Stored.at(file, position, info.type.name, info.shape).astype(np.float32)
    check_readable(info, reader.label)
    blocks = Stored.at(file, position, "U8", (info.n_rows, info.row_bytes))
    if not isinstance(blocks, LazyArray):
        return _decoded(blocks, info.type.name, info.shape)
    return Made.of(_decoded, (blocks, info.type.name, info.shape), info.shape, np.float32)


def _decoded(blocks: np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    from lora_gguf.quants.table import CODECS

    return CODECS[type_name].decoded(blocks).reshape(shape)


def check_readable(info: TensorInfo, label: str) -> None:
    """Raise ``UnsupportedError`` where no codec knows the tensor's type."""
    from lora_gguf.quants.table import CODECS

    if info.type.name not in CODECS:
        raise UnsupportedError(f"{label}: {info.name}: cannot read type {info.type}: write the adapter as F16")


def _adapter_alpha(reader: GgufReader) -> float:
    if reader.get("general.type") != "adapter" or reader.get("adapter.type") != "lora":
        raise MalformedError(
            f"{reader.label}: expected an adapter (general.type adapter, adapter.type lora), "
            f"found {printable(reader.get('general.type', 'a model'), 40)}: give base and adapter in this order"
        )
    entry = reader.kv.get("adapter.lora.alpha")
    if entry is not None and entry.type != 6:
        raise MalformedError(f"{reader.label}: adapter.lora.alpha: expected an f32: convert the adapter again")
    alpha = reader.get("adapter.lora.alpha", 0.0)
    if not math.isfinite(alpha):
        raise NumericError(f"{reader.label}: adapter.lora.alpha is {alpha}: the adapter is broken")
    return alpha


def _halves(reader: GgufReader) -> dict[str, dict[str, TensorInfo]]:
    """Base tensor name -> its two factors. Refuses what is neither, and a factor without the other."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in reader.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in ("lora_a", "lora_b"):
            halves.setdefault(stem, {})[suffix] = info
        elif not name.endswith("_norm.weight"):
            strange.append(f"{name}: neither lora_a nor lora_b")
    strange += [f"{stem}: {next(iter(half))} without the other half" for stem, half in halves.items() if len(half) < 2]
    if strange:
        raise MalformedError(f"{reader.label}: {strange[0]}: convert the adapter again", strange)
    return halves


def _pair(reader: GgufReader, name: str, a: np.ndarray, b: np.ndarray, alpha: float) -> LoraPair:
    sources = (f"{name}.lora_a", f"{name}.lora_b")
    fits = a.ndim == b.ndim and a.ndim in (2, 3) and a.shape[:-2] == b.shape[:-2]
    if name.endswith(EMBEDDING) and fits:
        a, b = contiguous(b.T), a
    if not fits or a.shape[-2] != b.shape[-1] or 0 in a.shape or 0 in b.shape:
        raise MalformedError(
            f"{reader.label}: {name}: lora_a {a.shape} and lora_b {b.shape} do not multiply: convert the adapter again"
        )
    return LoraPair(name, a, b, alpha / b.shape[-1] if alpha else 1.0, sources)
