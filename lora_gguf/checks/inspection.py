"""What a GGUF or an adapter is, as its header says: nothing here reads weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lora_gguf.adapters.adapter import sort_tensors
from lora_gguf.adapters.adapter_config import check_supported, kind_of
from lora_gguf.adapters.kinds import KINDS, Module, scale_of
from lora_gguf.adapters.lora import EMBEDDING, HEAD
from lora_gguf.checks.kinship import base_model_of, text
from lora_gguf.errors import LoraGgufError, MalformedError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.weights import Entry
from lora_gguf.mapping.towers import CLIP
from lora_gguf.merging.provenance import merges_of
from lora_gguf.merging.retention import kind_of as kind_of_tensor
from lora_gguf.quants.ggml import FILE_TYPES

# general.type -> what the file is
GGUF_KINDS = {
    "model": "model",
    "mmproj": "projector of images or sound (mmproj)",
    "imatrix": "importance matrix",
    "adapter": "adapter (GGUF)",
}
# field of adapter_config.json that changes how a LoRA works -> what it is then called
VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "alora_invocation_tokens": "aLoRA", "lora_bias": "with biases"}
# the factor of a module whose smaller side is the rank
RANKED = ("lora_A", "lora_embedding_A", "lora_a", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


@dataclass(frozen=True)
class TypeShare:
    """The tensors of one type: how many, their weights, their bytes."""

    n_tensors: int
    n_parameters: int
    n_bytes: int


@dataclass(frozen=True)
class Ranks:
    """How many modules have this ``rank``, and the ``scale`` (alpha / rank, or as the kind has it) that multiplies B @
    A.
    """

    rank: int
    scale: float | None
    n_modules: int


@dataclass(frozen=True)
class Provenance:
    """How lora-gguf made a merged file; ``adapters`` are names with the scales that multiplied their own, ``imatrix``
    is the name of the importance matrix ('' where none was used).
    """

    version: str
    adapters: list[tuple[str, float]]
    rounding: str
    seed: int
    imatrix: str = ""


@dataclass(frozen=True)
class TowerFacts:
    """A tower of an mmproj: of ``vision`` or ``audio``, and its projector. Numbers that the header does not state are
    None.
    """

    part: str
    projector: str
    n_layers: int | None
    embedding_length: int | None
    n_heads: int | None


@dataclass(kw_only=True)
class Inspection:
    """What every file has: ``types`` by name, sizes in bytes, ``base_model`` as the file names it ('' where it does
    not).
    """

    source: str
    kind: str
    files: list[str]
    n_bytes: int
    n_parameters: int = 0
    types: dict[str, TypeShare] = field(default_factory=dict)
    architecture: str = ""
    name: str = ""
    base_model: str = ""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Return the inspection as plain data for JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class ModelInspection(Inspection):
    """A model's GGUF, or its mmproj's, which has ``towers``. Numbers that the header does not state are None;
    ``provenance`` is that of a file lora-gguf merged, and ``earlier`` those of the merges that made its base, the first
    one first.
    """

    quantization: str = ""
    n_layers: int | None = None
    embedding_length: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    n_experts: int | None = None
    context_length: int | None = None
    vocabulary_size: int = 0
    tokenizer: str = ""
    chat_template: bool = False
    tied_head: bool = False
    towers: list[TowerFacts] = field(default_factory=list)
    provenance: Provenance | None = None
    earlier: list[Provenance] = field(default_factory=list)


@dataclass(kw_only=True)
class AdapterInspection(Inspection):
    """An adapter. ``targets`` counts its modules by kind, ``whole`` the tensors that were trained whole; ``refusal`` is
    why lora-gguf cannot use it ('' where it can).
    """

    method: str = ""
    alpha: float | None = None
    ranks: list[Ranks] = field(default_factory=list)
    targets: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    n_layers: int = 0
    tokenizer_files: list[str] = field(default_factory=list)
    refusal: str = ""


def inspect_gguf(base: Base, source: str) -> Inspection:
    """Return what the open GGUF is."""
    kind = base.get("general.type", "mmproj" if base.architecture == CLIP else "model")
    common = dict(
        source=source,
        kind=GGUF_KINDS.get(kind, f"GGUF of type {text(kind)}")
        if base.tensors or kind != "model"
        else "vocabulary without weights",
        files=[printable(reader.label) for reader in base.readers],
        n_bytes=sum(reader.size for reader in base.readers),
        n_parameters=sum(info.n_elements for info in base.tensors.values()),
        types=by_type((info.type.name, info.n_elements, info.n_bytes) for info in base.tensors.values()),
        architecture=text(base.architecture),
        name=text(base.get("general.name", "")),
        base_model=base_model_of(base),
    )
    return adapter_gguf(base, common) if kind == "adapter" else model(base, common)


def by_type(tensors: Iterable[tuple[str, int, int]]) -> dict[str, TypeShare]:
    """Return the shares of (type, weights, bytes), the largest first."""
    found: dict[str, list[int]] = {}
    for name, n_parameters, n_bytes in tensors:
        sums = found.setdefault(name, [0, 0, 0])
        sums[:] = [sums[0] + 1, sums[1] + n_parameters, sums[2] + n_bytes]
    return {name: TypeShare(*sums) for name, sums in sorted(found.items(), key=lambda item: -item[1][2])}


def model(base: Base, common: dict) -> ModelInspection:
    """Return the inspection of a model; ``common`` are the fields that every inspection has."""
    file_types = {number: name for name, number in FILE_TYPES.items()}
    tokenizer = [text(base.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre")]
    merges = provenances_of(base)
    if merges:
        common["kind"] = f"merged {common['kind']}"
    return ModelInspection(
        **common,
        quantization=file_types.get(base.get("general.file_type"), ""),
        n_layers=number(base.hparam("block_count")),
        embedding_length=number(base.hparam("embedding_length")),
        n_heads=number(base.hparam("attention.head_count")),
        n_kv_heads=number(base.hparam("attention.head_count_kv")),
        n_experts=number(base.hparam("expert_count")) or None,
        context_length=number(base.hparam("context_length")),
        vocabulary_size=base.length("tokenizer.ggml.tokens"),
        tokenizer=", ".join(filter(None, tokenizer)),
        chat_template="tokenizer.chat_template" in base.kv,
        tied_head=EMBEDDING in base.tensors and HEAD not in base.tensors,
        towers=towers_of(base) if base.architecture == CLIP else [],
        provenance=merges[-1] if merges else None,
        earlier=merges[:-1],
    )


def towers_of(base: Base) -> list[TowerFacts]:
    """Return the towers of an mmproj; the one projector that older files name is that of each."""
    common = text(base.get("clip.projector_type", ""))
    return [
        TowerFacts(
            part,
            text(base.get(f"clip.{part}.projector_type", "")) or common,
            *(
                number(base.hparam(f"{part}.{key}"))
                for key in ("block_count", "embedding_length", "attention.head_count")
            ),
        )
        for part in ("vision", "audio")
        if base.get(f"clip.has_{part}_encoder")
    ]


def number(value: object) -> int | None:
    """Return a count that the header states: some architectures have a list of one a layer, the largest counts."""
    if isinstance(value, list):
        value = max((item for item in value if type(item) is int), default=None)
    return value if type(value) is int else None


def provenances_of(base: Base) -> list[Provenance]:
    """Return how lora-gguf made the file: its merges, the first one first; none where it did not."""
    return [found for keys in merges_of(base) if (found := provenance_of(keys))]


def provenance_of(keys: dict[str, object]) -> Provenance | None:
    """Return what the keys of one merge say; None where they say nothing of its adapters."""
    names, scales = keys.get("adapter.names"), keys.get("adapter.scales")
    if not isinstance(names, list) or not isinstance(scales, list):
        return None
    adapters = [(text(name), float(scale)) for name, scale in zip(names, scales, strict=False)]
    version, rounding, imatrix = (text(keys.get(key, "")) for key in ("version", "rounding", "imatrix"))
    return Provenance(version, adapters, rounding, number(keys.get("seed")) or 0, imatrix)


def adapter_gguf(base: Base, common: dict) -> AdapterInspection:
    """Return the inspection of an adapter GGUF; ``common`` as for ``model``."""
    alpha = base.get("adapter.lora.alpha", 0.0)
    ranks: Counter[tuple[int, float]] = Counter()
    targets: Counter[str] = Counter()
    layers: set[str] = set()
    for name, info in base.tensors.items():
        if name.endswith(".lora_b"):
            stem = name.removesuffix(".lora_b")
            rank = info.shape[-1] if info.shape and not stem.endswith(EMBEDDING) else (1, *info.shape)[-2]
            ranks[rank, alpha / rank if alpha and rank else 1.0] += 1
            targets[kind_of_tensor(stem)] += 1
            layers |= set(re.findall(r"blk\.(\d+)\.", stem))
    return AdapterInspection(
        **common,
        method="aLoRA" if base.get("adapter.alora.invocation_tokens") else "LoRA",
        alpha=alpha,
        ranks=[Ranks(rank, scale, n) for (rank, scale), n in sorted(ranks.items())],
        targets=dict(targets),
        n_layers=len(layers),
    )


def inspect_peft(config: dict, tensors: list[Entry], files: dict[str, int], source: str) -> AdapterInspection:
    """Return what the adapter is whose ``adapter_config.json`` holds ``config`` and whose weights' header lists
    ``tensors``.

    ``files`` are the sizes of its files by name, 0 where unknown.
    """
    found = AdapterInspection(
        source=source,
        kind="adapter (PEFT)" if kind_of(config) != "MLX" else "adapter (mlx-lm)",
        files=[printable(Path(name).name) for name in files],
        n_bytes=sum(files.values()),
        n_parameters=sum(n_elements(entry) for entry in tensors),
        types=by_type((entry.dtype, n_elements(entry), entry.end - entry.start) for entry in tensors),
        architecture=text((config.get("auto_mapping") or {}).get("base_model_class", "")),
        base_model=text(config.get("base_model_name_or_path") or config.get("model", "")),
        method=method_of(config),
        alpha=config.get("lora_alpha", config.get("alpha")),
        tokenizer_files=[Path(name).name for name in files if re.search(r"token|chat_template", name)],
    )
    try:
        check_supported(config)
    except LoraGgufError as error:
        found.refusal = str(error)
    if kind_of(config) in KINDS:
        add_modules(found, config, tensors)
    return found


def n_elements(entry: Entry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64))


def method_of(config: dict) -> str:
    """Return LoRA, DoRA, IA3, … with what else changes how it works."""
    kind = kind_of(config)
    variants = [name for field_name, name in VARIANTS.items() if config.get(field_name)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in ("true", "gaussian", "eva", "orthogonal"):
        variants.append(f"initialised by {printable(init, 40)}")
    if kind == "LORA" and variants and not variants[0].startswith(("with", "init")):
        return ", ".join(variants)
    names = {"LORA": "LoRA", "MLX": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}
    return ", ".join([names.get(kind, printable(kind, 40)), *variants])


def add_modules(found: AdapterInspection, config: dict, tensors: list[Entry]) -> None:
    """Count modules, ranks and scales; the tensors' places are taken by arrays that have a shape and no memory."""
    nothing = np.zeros((), np.float32)
    contents = sort_tensors({entry.name: np.broadcast_to(nothing, entry.shape) for entry in tensors}, config)
    ranks = Counter(filter(None, (ranks_of(module, config, found) for module in contents.modules.values())))
    paths = [*contents.modules, *(update.name for update in contents.updates)]
    found.ranks = [Ranks(*key, n) for key, n in sorted(ranks.items(), key=lambda item: -item[1])]
    found.targets = dict(Counter(kind_of_module(path) for path in contents.modules))
    found.whole = dict(Counter(f"{kind_of_module(update.name)}.{update.part}" for update in contents.updates))
    found.n_layers = len({match[1] for path in paths if (match := re.search(r"\.(\d+)\.", path))})
    found.notes += [printable(line) for line in contents.strange]
    found.notes += [printable(f"{name}: {why}") for name, why in contents.unknown.items()]


def kind_of_module(path: str) -> str:
    return printable(re.sub(r"(\.base_layer)+$", "", path).rpartition(".")[2], 60)


def ranks_of(module: Module, config: dict, found: AdapterInspection) -> tuple[int, float | None] | None:
    """Return (rank, scale) of a module; None where it has no rank. PEFT's packed experts have that of the
    configuration.
    """
    name = next((name for name in RANKED if name in module.factors), "")
    factor = module.factors.get(name)
    if factor is None or factor.ndim < 2:
        return None
    rank = (
        len(factor) if name == "lora_A" and factor.ndim > 2 else min(factor.shape[-2:])
    )  # a convolution's comes first
    if kind_of(config) != "LORA":
        scale = (config.get("lora_parameters") or {}).get("scale")
        return rank, scale if type(scale) in (int, float) else None
    if config.get("target_parameters") and kind_of_module(module.path) == "experts":
        rank = config.get("r", rank)
    try:
        return rank, scale_of(module.path, rank, config)
    except MalformedError as error:
        found.notes.append(str(error))
        return rank, None
