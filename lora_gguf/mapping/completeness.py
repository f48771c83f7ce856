"""What an adapter's configuration promises and its file does not hold: modules that would silently stay as they are.

PEFT warns of the same when it loads an adapter ("missing adapter keys"): it has the base model's modules. Here they are
those that the base GGUF has a tensor for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from lora_gguf.adapters.adapter import Adapter
from lora_gguf.adapters.adapter_config import kind_of
from lora_gguf.adapters.lora import EMBEDDING, HEAD, LoraPair
from lora_gguf.adapters.patterns import matcher
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import LoraGgufError, printable
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.names import LAYER, name_map, pieces, shape_in_base, why_skipped

_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# PEFT adds these names to modules_to_save together, whichever of them the model has
_TOGETHER = ({"classifier", "score"},)
_EMBEDDINGS = {"embed_tokens", "lm_head"}

Test = Callable[[str], bool]


def missing(adapter: Adapter, hparams: Hparams, changed: Iterable[str]) -> list[str]:
    """Return warnings on what ``adapter`` should hold and does not; ``changed`` are the base's tensors that it
    changes.
    """
    found = [*missing_targets(adapter, hparams, set(changed)), *missing_whole(adapter, hparams)]
    lines = [f"{field}: the adapter has no weights for {what}" for field, what in found]
    return [f"{line}: what it names stays as in the base: is the file whole?" for line in lines]


def missing_targets(adapter: Adapter, hparams: Hparams, changed: set[str]) -> Iterator[tuple[str, str]]:
    """Return modules that ``target_modules`` asks for, that the base has, and for which the file has nothing."""
    if hparams.tensors is None:
        return
    config, paths = adapter.config, {update.name for update in adapter.updates}
    asked = target_test(config)
    wanted = [*beside(paths, asked, hparams), *(kinds_left_out(paths, asked, hparams, changed) if asked else ())]
    lost = [path for path in dict.fromkeys(wanted) if path not in paths and in_layers(path, config)]
    if lost:
        more = f"{len(lost)} modules, such as {lost[0]}" if len(lost) > 1 else lost[0]
        yield "target_modules", printable(more)


def missing_blocks(pairs: Iterable[LoraPair], hparams: Hparams) -> list[str]:
    """Return a warning where a kind of tensor has no pair in some layer in which others have; for adapters without a
    configuration.
    """
    names = {pair.name for pair in pairs}
    split = [match.groups() for name in names if (match := _BLOCK.fullmatch(name))]
    layers, kinds = {int(layer) for layer, _ in split}, {kind for _, kind in split}
    wanted = [f"blk.{layer}.{kind}" for kind in sorted(kinds) for layer in sorted(layers)]
    lost = [name for name in wanted if name not in names and not hparams.lacks(name, default=True)]
    if not lost:
        return []
    what = f"{len(lost)} tensors, such as {lost[0]}" if len(lost) > 1 else lost[0]
    return [f"the adapter has nothing for {what}, though it changes others of its kind and layer: is the file whole?"]


def target_test(config: dict) -> Test | None:
    """Return whether ``target_modules`` asks for a module path, as PEFT reads it; None where it does not say."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear":
        return None
    try:
        asked, not_asked = named_by(targets), named_by(excluded or [])
    except LoraGgufError:
        return None
    return lambda path: asked(path) and not not_asked(path)


def named_by(names: object) -> Test:
    """Return whether a path is one of ``names`` or ends in one; of a string, whether it matches as a regular
    expression.
    """
    if isinstance(names, str):
        return matcher(names)
    known = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    return lambda path: any(path[i:] in known for i in [0, *(m.end() for m in re.finditer(r"\.", path))])


def in_layers(path: str, config: dict) -> bool:
    """Return whether ``layers_to_transform`` lets a module be adapted."""
    layers, match = config.get("layers_to_transform"), LAYER.search(path)
    chosen = [layers] if isinstance(layers, int) else layers
    return not isinstance(chosen, list) or match is None or int(match[1]) in chosen


def beside(paths: set[str], asked: Test | None, hparams: Hparams) -> Iterator[str]:
    """Return modules of the same kind as those of ``paths`` in other layers, or of other experts, that the base has.

    Where nothing says which layers were adapted, only those between the first and the last are expected.
    """
    counts = [hparams.get(key) for key in ("block_count", "nextn_predict_layers")]
    n_blocks, n_predicted = (count if isinstance(count, int) else 0 for count in counts)
    n_layers = n_blocks - n_predicted
    for number, count in ((LAYER, n_layers), (_EXPERT, hparams.get("expert_count") or 0)):
        groups: dict[tuple[str, str], set[int]] = {}
        for path in sorted(paths):
            if match := number.search(path):
                groups.setdefault((path[: match.start(1)], path[match.end(1) :]), set()).add(int(match[1]))
        for (head, tail), present in groups.items():
            known = asked if asked is not None and all(asked(f"{head}{i}{tail}") for i in present) else None
            span = range(count) if known else range(min(present), max(present))
            for i in span:
                path = f"{head}{i}{tail}"
                if i not in present and (known is None or known(path)) and has_module(path, hparams):
                    yield path


def kinds_left_out(paths: set[str], asked: Test, hparams: Hparams, changed: set[str]) -> Iterator[str]:
    """Return modules of kinds for which ``paths`` has none at all, by the names under which they are known."""
    changed = changed | ({HEAD} if hparams.tied and EMBEDDING in changed else set())
    heads = list(dict.fromkeys(path[: match.end(1) + 1] for path in sorted(paths) if (match := LAYER.search(path))))
    some = heads[:: max(len(heads) // 3, 1)]  # a list may name the modules of each layer
    ends = {path.rpartition(".")[2] for path in paths}
    parents = {path[len(head) :].rpartition(".")[0] for head in heads for path in paths if path.startswith(head)}
    for known in sorted(name_map(), key=lambda known: known.partition("{bid}.")[2].rpartition(".")[0] not in parents):
        before, _, tail = known.partition("{bid}.")
        if "{" in tail or known.rpartition(".")[2] in ends or (before != known and not tail):
            continue
        if tail and not any(asked(head + tail) for head in some):
            continue
        for path in [head + tail for head in heads] if tail else [known]:
            names = targets_of(path, hparams) if asked(path) else set()
            if names and not names & changed:
                changed |= names  # which other names may mean too
                yield path


def has_module(path: str, hparams: Hparams) -> bool:
    """Return whether the base has the tensors of the module at ``path``."""
    return bool(targets_of(path, hparams))


def targets_of(path: str, hparams: Hparams) -> set[str]:
    """Return the tensors of the base that hold the module at ``path``; empty where it has no such module."""
    try:
        shape = None if why_skipped(path, hparams) else shape_in_base(path, hparams)
        return {piece.name for piece in pieces(path, shape, hparams)} if shape else set()
    except (LoraGgufError, ValueError):
        return set()


def missing_whole(adapter: Adapter, hparams: Hparams) -> Iterator[tuple[str, str]]:
    """Return modules, rows, parameters and biases that the configuration says were trained, and the file does not
    hold.
    """
    config, updates = adapter.config, adapter.updates
    paths = [f".{update.name}." for update in updates]
    whole = [f".{update.name}." for update in updates if getattr(update, "replaces", False)]
    whole += [f".{path}." for path in adapter.originals]
    for name in config.get("modules_to_save", ()):
        if not any(f".{also}." in path for path in whole for also in also_called(name, hparams)):
            yield "modules_to_save", printable(name, 60)
    indices = config.get("trainable_token_indices") or ()
    for name in indices if isinstance(indices, dict) else ["embed_tokens"] if indices else []:
        if not any(path.endswith(f"{name}.") for path in paths):
            yield "trainable_token_indices", f"rows of {printable(name, 60)}"
    for name in config.get("target_parameters", ()):
        if not any(path.endswith(f".{name.removesuffix('.weight')}.") for path in paths):
            yield "target_parameters", printable(name, 60)
    if not any(update.part == "bias" for update in updates):
        if config.get("lora_bias") and kind_of(config) == "LORA":
            yield "lora_bias", "a bias beside lora_B"
        if config.get("bias", "none") != "none" and has_bias(updates, hparams):
            yield "bias", "the biases that the base has"


def has_bias(updates: Iterable[LoraPair | Update], hparams: Hparams) -> bool:
    """Return whether the base has a bias beside a tensor that one of ``updates`` changes."""
    names = {name for update in updates for name in targets_of(update.name, hparams)}
    return any(not hparams.lacks(name.removesuffix("weight") + "bias", default=True) for name in names)


def also_called(name: str, hparams: Hparams) -> set[str]:
    """Return what of an adapter answers for a name in ``modules_to_save``."""
    names = {name}
    for group in (*_TOGETHER, *([_EMBEDDINGS] if hparams.tied else [])):
        names |= group if names & group else set()
    return names
