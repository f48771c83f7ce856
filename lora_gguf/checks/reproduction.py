"""Make a merge again as its file says that it was made, and compare all bytes: the plainest proof, if it succeeds.

What we wrote we can write again: the same base, adapters, rounding and seed give the same bytes. The types of the
tensors are read from the file itself, so that no option which chose them needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_gguf import __version__
from lora_gguf.checks.findings import Finding
from lora_gguf.errors import FileError, LoraGgufError, printable
from lora_gguf.files.base import SPLIT_KEYS, Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import header, layout, raw_key_values
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.hub.hashes import digests
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.identity import adapter_sha256, header_sha256, known_sha256, n_file_bytes
from lora_gguf.merging.layout import OutputPart
from lora_gguf.merging.options import ROUNDINGS, Policy
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.provenance import PARENT, PREFIX, SEAL, Names, merged_key_values, repos_of, seal_of
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.types import with_recipe
from lora_gguf.quants.table import CODECS

Placements = Sequence[tuple[Placement, float]]
SAME_SCALE = 1e-6  # of the scales themselves, which the file has in f32: however small, others are others


@dataclass
class Origin:
    """How a file says that it was made: by which ``policy``, or ``why`` it cannot be made again.

    ``placements`` are the adapters that it names, with their factors, in its order; ``finding`` is what is wrong with
    what it says.
    """

    policy: Policy | None = None
    names: Names = field(default_factory=lambda: Names(()))
    placements: Placements = ()
    why: str = ""
    finding: Finding | None = None


def origin_of(result: Base, model: Base, placements: Placements, imatrix: Imatrix | None) -> Origin:
    """Read the keys ``lora_gguf.*`` of a merged file, and compare them with what it is said to be made of."""
    found = {key.removeprefix(PREFIX): result.get(key) for key in result.kv if key.startswith(PREFIX)}
    if not found:
        return Origin()
    seal = f"a whole seal, {SEAL}"
    broken = None if is_sealed(result) else Finding("metadata", (), seal, "one that the other keys do not fit")
    if "metadata_sha256" not in found:
        if not {"adapter.sha256", "base.header_sha256", "base.size"} & found.keys():
            return Origin(why="it is from a lora-gguf that did not yet record what it takes to merge again")
        broken = Finding("metadata", (), seal, "none")
    if found.get("version") != __version__:
        why = f"it was made by lora-gguf {printable(found.get('version'), 40)}, this is {__version__}"
        return Origin(why=why, finding=broken)
    origin = _recorded(found, model, placements, imatrix)
    called = str(result.get(f"{PARENT}0.name") or "")  # where the base's file gave it: it may have another name by now
    origin.names = replace(origin.names, repos=repos_of(result), base=called)
    origin.finding = broken or origin.finding
    return origin


def is_sealed(result: Base) -> bool:
    """Tell whether the metadata are those over which the seal was made."""
    pairs = dict(zip(result.kv, raw_key_values(result.readers[0]), strict=True))
    before, seal, after = _around(list(pairs), SEAL)
    return bool(seal and set(after) <= set(SPLIT_KEYS) and result.get(SEAL) == seal_of([pairs[key] for key in before]))


def _around(keys: list[str], key: str) -> tuple[list[str], bool, list[str]]:
    at = keys.index(key) if key in keys else len(keys)
    return keys[:at], key in keys, keys[at + 1 :]


def _recorded(found: dict, model: Base, placements: Placements, imatrix: Imatrix | None) -> Origin:
    """The origin that well-formed keys tell."""
    rounding, seed, label = found.get("rounding"), found.get("seed"), found.get("imatrix", "")
    names, files = _strings(found.get("adapter.names")), _strings(found.get("base.sha256", []))
    if type(seed) is not int or not 0 <= seed < 2**64:
        return Origin(why=f"its keys {PREFIX}* are incomplete")
    if rounding not in ROUNDINGS or names is None or files is None or type(label) is not str:
        return Origin(why=f"its keys {PREFIX}* are incomplete")
    if (found.get("base.header_sha256"), found.get("base.size")) != (header_sha256(model), n_file_bytes(model)):
        return Origin(why="it says that it was made of another base, or of this one with another header")
    if files and files != _sha256_of_files(model, files):
        wrong = Finding(
            "metadata", (), "the sha256 of the base's files", ", ".join(printable(one, 64) for one in files)
        )
        return Origin(why="it says that it was made of other files than the base's", finding=wrong)
    hashes, scales = _strings(found.get("adapter.sha256")), _numbers(found.get("adapter.scales"))
    asked = [(adapter_sha256(placement), scale) for placement, scale in placements]
    if not hashes or scales is None or not len(hashes) == len(scales) == len(names):
        return Origin(why=f"its keys {PREFIX}* are incomplete")
    if set(hashes) != {key for key, _ in asked}:
        why = "it says that it holds other adapters, or these in another precision"
        return Origin(why=why, finding=_other_adapters(list(zip(hashes, names, scales, strict=True)), asked))
    merged = [(digest, as_given(scale, asked)) for digest, scale in zip(hashes, scales, strict=True)]
    if not same_sum(merged, asked, all(not (one.updates or one.new_rows) for one, _ in placements)):
        given = _listed([scale for _, scale in asked])
        wrong = Finding("scale", (), f"the adapters times {given}", _listed(scales))
        return Origin(why="it says that it was merged with other scales", finding=wrong)
    if label and not imatrix:
        used = printable(label, 100)
        return Origin(why=f"it was merged with the importance matrix {used}: name it with --imatrix to merge again")
    by_hash = dict(zip([key for key, _ in asked], [placement for placement, _ in placements], strict=True))
    policy = Policy(rounding, seed, imatrix=imatrix if label else None)
    return Origin(policy, Names(names, label, files), [(by_hash[digest], scale) for digest, scale in merged])


def _sha256_of_files(model: Base, recorded: list[str]) -> list[str]:
    """Return the sha256 of each of the base's files, of local ones by reading them; what is ``recorded`` where neither
    the disk nor the Hub's cache has them.
    """
    if known := known_sha256(model.paths):
        return known
    if not all(path.is_file() for path in model.paths):
        return recorded
    return [next(iter(digests(path, {64}))) for path in model.paths]


def _other_adapters(recorded: list[tuple[str, str, float]], asked: list[tuple[str, float]]) -> Finding | None:
    """Return what is wrong where a file records (sha256, name, scale) of more adapters than those asked for, or of
    fewer; None where some are others, which may be the same in another precision.
    """
    files, named = {digest for digest, *_ in recorded}, {digest for digest, _ in asked}
    if named < files:
        more = [f"{printable(name, 100)} at scale {scale:g}" for digest, name, scale in recorded if digest not in named]
        return Finding("more adapters", (), "no other adapter", f"{' and '.join(more)} too")
    if files < named:
        held = ", ".join(printable(name, 100) for _, name, _ in recorded)
        return Finding("fewer adapters", (), f"{len(named)} adapters", f"only {held}")
    return None


def as_given(scale: float, asked: list[tuple[str, float]]) -> float:
    """Return a scale as the user gave it, of which the file has the f32: one ``asked`` for, or the shortest."""
    return next((given for _, given in asked if np.float32(given) == np.float32(scale)), float(str(np.float32(scale))))


def same_sum(recorded: list[tuple[str, float]], asked: list[tuple[str, float]], linear: bool) -> bool:
    """Tell whether both add the same, in any order; where updates are ``linear`` in their scale, in any parts."""
    if not linear:
        return sorted(recorded) == sorted(asked)
    totals: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for sign, named in ((1, recorded), (-1, asked)):
        for digest, scale in named:
            totals[digest] = totals.get(digest, 0.0) + sign * scale
            sizes[digest] = sizes.get(digest, 0.0) + abs(scale)
    return all(abs(total) <= SAME_SCALE * sizes[digest] for digest, total in totals.items())


def _strings(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(type(item) is str for item in value) else None


def _numbers(value: object) -> list[float] | None:
    return value if isinstance(value, list) and all(type(item) is float for item in value) else None


def _listed(scales: list[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)


def plan_again(model: Base, result: Base, origin: Origin) -> Plan | None:
    """Return the plan of a merge into the types that the tensors of ``result`` have; None where it cannot have been.

    Raises ``FileError`` where a file cannot be read.
    """
    if origin.policy is None:
        return None
    policy = origin.policy
    try:
        plan = make_plan(model, origin.placements, policy)
    except FileError:
        raise
    except LoraGgufError:
        return None
    found = [(tensor, result.tensors.get(tensor.target.name, tensor.target).type) for tensor in plan.tensors]
    if any(type.name not in CODECS for tensor, type in found if type != tensor.target.type):
        return None
    tensors = [tensor if type == tensor.target.type else with_recipe(tensor, policy, type) for tensor, type in found]
    return replace(plan, tensors=tensors)


def header_findings(origin: Origin, model: Base, result: Base, plan: Plan) -> Iterator[Finding]:
    """Tell what differs from the files that the merge writes, but for the tensors: metadata, table, padding, size."""
    metadata = merged_key_values(model, plan, origin.placements, origin.policy or Policy(), origin.names)
    by_name, count = {tensor.target.name: tensor for tensor in plan.tensors}, len(result.readers)
    for number, reader in enumerate(result.readers):
        tensors = [by_name[name] for name in reader.tensors if name in by_name]
        part = OutputPart(reader.path, tensors, number, count)
        wanted = part.key_values(metadata, len(plan.tensors))
        yield from _unlike(reader, model, wanted, tensors)
    names = [name for reader in result.readers for name in reader.tensors]
    if set(names) == set(by_name) and names != list(by_name):
        yield Finding("damaged", (), "the tensors in the base's order", "another order")


def _unlike(reader: GgufReader, model: Base, wanted: list[bytes], tensors: list[TensorPlan]) -> Iterator[Finding]:
    stored = raw_key_values(reader)
    of_key = dict(zip(reader.kv, stored, strict=True))
    for raw in wanted:
        key = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode("utf-8", "surrogateescape")
        if of_key.pop(key, None) != raw and key != SEAL:
            yield _of_key(key, model, key in reader.kv)
    for key in of_key:
        yield Finding("metadata", (), f"no key {printable(key)}", "one")
    if [pair for pair in wanted if pair in stored] != [pair for pair in stored if pair in wanted]:
        yield Finding("metadata", (), "the keys in the order of the merge's", "another order")
    placed = layout([tensor.target for tensor in tensors], model.alignment)
    whole = header(wanted, placed, model.alignment)
    if sorted(stored) == sorted(wanted) and len(tensors) == len(reader.tensors):
        found = reader.source.read(0, min(len(whole), reader.size))
        if found != whole:
            yield Finding("damaged", (), "the header that the merge writes", f"another in {reader.label}")


def _of_key(key: str, model: Base, present: bool) -> Finding:
    whose = "the base's " if key in model.kv else "the merge's "
    return Finding("metadata", (), whose + printable(key), "another value" if present else "none")


def tail_findings(result: Base) -> Iterator[Finding]:
    """Tell what lies between and after the tensors' data that should not."""
    for reader in result.readers:
        infos = list(reader.tensors.values())
        ends = [reader.table_end, *(reader.data_position + info.offset + info.n_bytes for info in infos)]
        starts = [reader.data_position + info.offset for info in infos]
        last = min(max(reader.data_position, -(-ends[-1] // reader.alignment) * reader.alignment), reader.size)
        gaps = zip(ends, [*starts, last], strict=True)
        if any(any(reader.source.read(start, stop - start)) for start, stop in gaps if stop > start):
            yield Finding("damaged", (), "zeros between the tensors", f"other bytes in {reader.label}")
        if reader.size > last:
            yield Finding("damaged", (), "nothing after the last tensor", f"{reader.size - last} bytes")


def short_findings(result: Base) -> Iterator[Finding]:
    """Tell where a file ends before the padding that a merge writes."""
    for reader in result.readers:
        ends = [reader.data_position + info.offset + info.n_bytes for info in reader.tensors.values()]
        if ends and reader.size < -(-ends[-1] // reader.alignment) * reader.alignment:
            yield Finding("damaged", (), "the padding of the last tensor", f"{reader.label} ends before it")
