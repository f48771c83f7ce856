"""Read an adapter directory: its configuration, and its tensors as updates of Hugging Face modules."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_gguf.adapters import adapter_config
from lora_gguf.adapters.adapter_config import kind_of
from lora_gguf.adapters.doubts import doubts
from lora_gguf.adapters.kinds import KINDS, SHARED, Module, pattern_value, scale_of, trainable_tokens
from lora_gguf.adapters.lora import LoraPair, check_finite
from lora_gguf.adapters.spellings import TORCHTUNE, module_path, peft_name
from lora_gguf.adapters.updates import Added, Replaced, Update
from lora_gguf.adapters.weight_files import SUFFIXES, read_all, weights_of
from lora_gguf.errors import FileError, MalformedError, NumericError, UsageError, printable
from lora_gguf.files.lazy_array import LazyArray, contiguous

EMPTY = "an empty tensor: DeepSpeed ZeRO-3 saves these where the weights are not gathered: gather and save them again"
WHOLE = re.compile(r"(?P<path>.+?)(\.(modules_to_save|ln_tuning_layers)(\.[^.]+)?)?[._](?P<part>weight|bias)")
# what VeLoRA and MonteCLoRA keep beside the factors
TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
# the order in which modules of packed experts register their parameters
PARAMETERS = ("gate_up_proj", "gate_proj", "w1", "up_proj", "v1", "w3", "down_proj", "w2", "weight")
# a repository in huggingface_hub's cache: its folder is called by the commit, which says nothing to a reader
_REPOSITORY = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)[/\\]snapshots[/\\][0-9a-f]{40}", re.ASCII)
_CACHED = re.compile(r"models--[^/\\]+--(?P<name>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]{40}$")


@dataclass
class Adapter:
    """An adapter in Hugging Face terms.

    ``updates`` are named by module path (``model.layers.0.self_attn.q_proj``), in the layout that the module's weight
    has in Hugging Face: (out, in); but the rows of attention's q and k as torchtune has them where it is
    ``torchtunes``. ``ignored`` maps tensors that are no update to the reason.
    """

    label: str
    directory: Path
    config: dict
    updates: list[LoraPair | Update]
    ignored: dict[str, str] = field(default_factory=dict)
    originals: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    torchtunes: bool = False

    @property
    def base_model(self) -> str:
        """What the adapter says that it was trained on; an empty string where it does not say."""
        return printable(self.config.get("base_model_name_or_path", ""), 100)

    @property
    def invocation_tokens(self) -> list[int]:
        """aLoRA: the token ids after which the adapter is active; empty for an adapter that always is."""
        return self.config.get("alora_invocation_tokens", [])


def allowed(names: Iterable[str], pattern: str | None) -> bool:
    """Return whether the user's regular expression lets leftovers of these names pass."""
    try:
        return pattern is not None and any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise UsageError(f"--allow-unused {printable(pattern, 60)}: not a regular expression: {error}") from None


def read_adapter(
    directory: str | os.PathLike, expert_b_layout: str | None = None, allow_unused: str | None = None
) -> Adapter:
    """Read ``adapter_config.json`` and the weights beside it.

    ``expert_b_layout`` (rank-major or expert-major) is how the B's of packed experts lie, where the adapter itself does
    not say; tensors that are none of an adapter's are ignored if ``allow_unused`` finds their name. Raises
    ``MalformedError``, ``UnsupportedError`` (a kind of adapter), ``NumericError`` (NaN, infinity), ``FileError``.
    """
    named = Path(directory) if Path(directory).is_file() else None
    directory = adapter_directory(directory)
    config = adapter_config.read_config(directory)
    adapter_config.check_supported(config)
    paths = weights_of(directory, named)
    stored = read_all(paths)
    torchtunes = any(TORCHTUNE.fullmatch(name) for name in stored)
    if torchtunes and any(name.endswith(".magnitude") for name in stored):
        config["use_dora"] = True  # which torchtune's configuration does not say
    tensors = {peft_name(name): as_f32(name, array) for name, array in stored.items()}
    check_all_finite(tensors, paths[0].name)
    found = updates_of(tensors, config, paths[0].name, expert_b_layout, allow_unused)
    label = adapter_name(directory.resolve())
    warnings = doubts(directory, found.updates, config, expert_b_layout)
    return Adapter(label, directory, config, found.updates, found.ignored, found.originals, warnings, torchtunes)


ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")


def adapter_directory(path: str | os.PathLike) -> Path:
    """Return the directory that holds ``adapter_config.json``: ``path``, or the folder of the file that it names."""
    path = Path(path)
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise FileError(f"{printable(path)}: an archive: unpack it, and name the folder with {adapter_config.NAME}")
    if path.is_file():
        return _directory_of(path)
    if not path.is_dir():
        raise FileError(f"{printable(path)}: no such directory: check the path")
    if (path / adapter_config.NAME).is_file():
        return path
    inner = sorted(found.parent.name for found in path.glob(f"*/{adapter_config.NAME}"))
    packed = sorted(found.name for found in path.iterdir() if found.suffix.lower() in ARCHIVES)
    hint = "it is no PEFT adapter: name the folder that has it"
    if inner:
        hint = f"use one of its folders: {printable(', '.join(inner))}"
    elif packed:
        hint = f"unpack {printable(packed[0])} first"
    raise FileError(f"{printable(path)}: expected {adapter_config.NAME}, found none: {hint}")


def _directory_of(file: Path) -> Path:
    """Return the folder of an adapter's ``file``, which its ``adapter_config.json`` lies beside."""
    if (file.parent / adapter_config.NAME).is_file():
        return file.parent
    if file.suffix.lower() in SUFFIXES:
        raise FileError(f"{printable(file)}: expected {adapter_config.NAME} beside it, found none: put it there")
    raise FileError(f"{printable(file)}: not an adapter: name its folder, its Hub id, its safetensors file or its GGUF")


def as_f32(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" and not name.endswith("ranknum"):
        raise MalformedError(
            f"{printable(name)}: expected floating-point numbers, found {array.dtype}: download it again"
        )
    if isinstance(array, LazyArray):
        return array.astype(np.float32)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def adapter_name(source: str | os.PathLike) -> str:
    """Return a short name for files and metadata: the last part of a path or Hub id."""
    text = os.fspath(source)
    path = os.path.normpath(text if os.path.exists(text) else text.split("@")[0].split("?")[0])
    cached = _CACHED.search(path)
    name = cached["name"] if cached else os.path.basename(path)
    return printable(name.removesuffix(".gguf"), 100)


def hub_id(path: str | os.PathLike[str]) -> str:
    """Return the repository that a file or folder of the Hub's cache is of; nothing for another path."""
    found = _REPOSITORY.search(os.path.normpath(os.fspath(path)))
    return f"{found['owner']}/{found['name']}" if found else ""


def check_all_finite(tensors: dict[str, np.ndarray], label: str) -> None:
    found = [place for name, array in tensors.items() if (place := check_finite(name, array, label))]
    if found:
        raise NumericError(
            f"{found[0]}: expected finite numbers: the adapter is broken, train or download it again", found
        )


def updates_of(
    tensors: dict[str, np.ndarray],
    config: dict,
    label: str,
    expert_b_layout: str | None = None,
    allow_unused: str | None = None,
) -> Contents:
    """Return the updates in ``tensors``, and the tensors that are none with the reason. Raises with all offenders."""
    found = sort_tensors(tensors, config)
    for name, why in found.unknown.items():
        if allowed([name], allow_unused):
            found.ignored[name] = f"--allow-unused: {why}"
        else:
            found.strange.append(f"{name}: {why}")
    for module in found.modules.values():
        try:
            found.updates += module_updates(module, found.modules, expert_b_layout)
        except MalformedError as error:
            found.strange.append(str(error))
    if found.strange:
        strange = list(dict.fromkeys(found.strange))
        raise MalformedError(f"{label}: {strange[0]}", strange if len(strange) > 1 else ())
    if not found.updates:
        raise MalformedError(
            f"{label}: expected the tensors of a {kind_of(config)} adapter, found none: it is no adapter"
        )
    return found


@dataclass
class Contents:
    """A file's tensors sorted: ``modules`` with adapter factors, ``updates`` so far, ``originals`` (the base's own
    weights by module path), ``ignored`` and ``unknown`` tensors with the reason, and what is ``strange``.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    updates: list[LoraPair | Update] = field(default_factory=list)
    originals: dict[str, np.ndarray] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)


def sort_tensors(tensors: dict[str, np.ndarray], config: dict) -> Contents:
    """Return the tensors of an adapter file by module and factor, and those that are no module's: ignored, with the
    reason, or unknown.
    """
    kind_factors = (*KINDS[kind_of(config)][1], "trainable_tokens_delta")
    pattern = re.compile(
        rf"(?P<path>.+?)\.(?P<factor>{'|'.join(kind_factors)})(\.(?!(weight|bias)$)(?P<adapter>[^.]+))?(?P<bias>\.bias)?"
        r"(\.weight)?"
    )
    empty = {name for name, array in tensors.items() if not array.size}
    shared = {name: array for key in SHARED for name, array in tensors.items() if name.split(".")[1:2] == [key]}
    found = Contents(ignored=dict.fromkeys(shared, "shared by the modules that it is applied with"))
    found.unknown |= dict.fromkeys(sorted(empty), EMPTY)
    shared_factors = {name.split(".")[1]: array for name, array in shared.items()}
    adapters: dict[str, str] = {}
    for name, array in tensors.items():
        if name in empty:
            continue
        if match := pattern.fullmatch(name):
            path = module_path(match["path"])
            adapters.setdefault(match["adapter"] or "", name)
            module = found.modules.setdefault(path, Module(path, {}, {}, config, shared_factors))
            add_factor(module, match["factor"] + (match["bias"] or ""), name, array, found)
        elif TRAINING.search(name):
            found.ignored[name] = "used in training alone"
        elif name not in shared:
            add_whole(name, array, found, config)
    found.strange += several_adapters(adapters)
    return found


def several_adapters(named: dict[str, str]) -> list[str]:
    """Return what is wrong where the tensors of one file are called by several adapters' names; ``named``: a tensor of
    each.
    """
    names = [name for name in named if name]
    if len(names) < 2:
        return []
    shown = ", ".join(names)
    return [f"{named[names[1]]}: one of {len(names)} adapters in this file ({shown}): save each alone"]


def add_factor(module: Module, factor: str, name: str, array: np.ndarray, found: Contents) -> None:
    if factor in module.factors:
        found.strange.append(f"{name}: the same factor as {module.names[factor]}: save one adapter alone")
    module.factors[factor], module.names[factor] = array, name


def add_whole(name: str, array: np.ndarray, found: Contents, config: dict) -> None:
    """Sort a tensor that is no factor: a copy of the base's, a tensor that was trained whole, or a strange one."""
    match = WHOLE.fullmatch(name)
    if match and (".base_layer.weight" in name or ".original_module." in name):
        found.ignored[name] = "a copy of the base's own weight"
        found.originals[re.sub(r"\.(base_layer|original_module)$", "", module_path(match["path"]))] = array
    elif match and array.ndim:
        update = whole(name, match, array)
        known = (u for u in found.updates if isinstance(u, Replaced | Added))
        same = next((u for u in known if (u.name, u.part) == (update.name, update.part)), None)
        if same is None:
            found.updates.append(update)
        elif np.array_equal(same.values, update.values):
            found.ignored[name] = f"the same as {same.sources[0]}"
        else:
            found.strange.append(f"{name}: another weight than {same.sources[0]} for the same module: save it again")
    else:
        found.unknown[name] = f"no tensor of a {kind_of(config)} adapter is called so"


def whole(name: str, match: re.Match, array: np.ndarray) -> Replaced:
    """Return a tensor that was trained and saved whole."""
    values = array.reshape(len(array), -1) if array.ndim > 2 else array.reshape(-1, array.shape[-1])
    path = module_path(match["path"]).removesuffix(".base_layer")
    return Replaced(name=path, shape=values.shape, sources=(name,), part=match["part"], values=values)


def module_updates(module: Module, modules: Collection[str], expert_b_layout: str | None) -> list[LoraPair | Update]:
    if "trainable_tokens_delta" in module.factors:
        return trainable_tokens(module)
    target = packed_parameter(module, modules)
    if target:
        return [packed_pair(module, target, expert_b_layout)]
    return KINDS[kind_of(module.config)][0](module)


def packed_parameter(module: Module, modules: Collection[str]) -> str | None:
    """Return the path of the parameter that the module's factors adapt, where it is one of PEFT's
    ``target_parameters``.

    Several parameters of one module are nested in the order of their registration, the last outermost, and each
    ``base_layer`` of the path leads one inward.
    """
    path = re.sub(r"(\.base_layer)+$", "", module.path)
    targets = [target.rpartition(".") for target in module.config.get("target_parameters", ())]
    found = list({name for head, _, name in targets if f".{path}".endswith(f".{head or 'experts'}")})
    found.sort(key=lambda name: PARAMETERS.index(name) if name in PARAMETERS else len(PARAMETERS))
    if not found:
        return None
    present = sum(1 for depth in range(len(found)) if path + ".base_layer" * depth in modules)
    depth = module.path.count(".base_layer", len(path))
    if depth >= len(found) or present != len(found):
        raise module.malformed(f"expected factors for {', '.join(found)} (target_parameters), found {present}")
    return f"{path}.{found[-1 - depth]}"


def packed_pair(module: Module, target: str, expert_b_layout: str | None) -> LoraPair:
    """Return the pair of a parameter; of packed experts (E, r, x) and (E, y, r), which axis is in or out unknown as
    yet.
    """
    b, a = module.matrices("lora_B", "lora_A")
    config = module.config
    rank = pattern_value(config.get("rank_pattern"), target, config.get("r", 0))
    if not rank or len(a) % rank or b.shape[1] != len(a):
        raise module.malformed(f"expected a multiple of rank {rank}, found lora_A {a.shape} and lora_B {b.shape}")
    scale = scale_of(target, rank, config)
    n = len(a) // rank
    path = target.removesuffix(".weight")
    if n == 1:
        return LoraPair(path, a, b, scale, module.sources)
    by_expert = (
        b.reshape(len(b), n, rank)
        if is_expert_major(target, config, expert_b_layout)
        else b.reshape(len(b), rank, n).swapaxes(1, 2)
    )
    b = contiguous(by_expert.swapaxes(0, 1))
    return LoraPair(path, a.reshape(n, rank, -1), b, scale, module.sources, packed=True)


def is_expert_major(target: str, config: dict, expert_b_layout: str | None) -> bool:
    """Return whether the columns of B lie expert by expert (Unsloth until September 2026), not rank by rank (PEFT)."""
    fused = config.get("unsloth_fused_expert_lora", {}).get("parameters", {})
    named: object = (
        next((entry for name, entry in fused.items() if target.endswith(name)), {}) if isinstance(fused, dict) else {}
    )
    layout = named.get("lora_B_layout") if isinstance(named, dict) else None
    layout = layout or config.get("lora_B_layout")
    return layout == "grouped_by_expert" if layout else expert_b_layout == "expert-major"
