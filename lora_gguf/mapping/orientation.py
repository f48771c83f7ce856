"""Which way the factors of packed experts go: PEFT's versions disagree on which axis of a parameter (E, …) is in and
which is out.

PEFT 0.17 and 0.18 take the axes of the parameter in their order, from 0.19.1 on the other way round, unless the model's
class says that it holds its experts turned (``is_transposed``); 0.19.0 has it the wrong way round.
"""

from __future__ import annotations

import re

from lora_gguf.adapters.adapter import Adapter
from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import UsageError, printable
from lora_gguf.mapping.architectures import ARCHITECTURES, Stored
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.torchtune_rows import doubts, in_halves

FLAG = "--expert-a-axis"
AXES = ("in", "out")
INTO_WIDTH = ("down_proj", "w2", "output_linear")
# the versions at which the order of the axes changed
FIRST, SWAPPED, FIXED = (0, 17, 0), (0, 19, 0), (0, 19, 1)
Version = tuple[int, ...]


def oriented(
    adapter: Adapter, hparams: Hparams, a_axis: str | None = None
) -> tuple[list[LoraPair | Update], list[str]]:
    """Return the updates of ``adapter`` with those of packed experts (E, …) turned to (out, in), the rows of attention
    in Hugging Face's order, and warnings.

    The shape tells, or that of another parameter of the adapter; of square ones PEFT's version and the base's
    architecture. ``a_axis`` is the user's word for those: ``in`` or ``out``, what the columns of lora_A are. Raises
    ``UsageError`` where nothing tells.
    """
    adapter = in_halves(adapter, hparams)
    packed = [update for update in adapter.updates if isinstance(update, LoraPair) and update.packed]
    turns = {id(pair): is_turned(pair, hparams.get("embedding_length")) for pair in packed}
    doubtful = [pair for pair in packed if turns[id(pair)] is None]
    known = {turn for turn in turns.values() if turn is not None}
    warnings = doubts(adapter, hparams)
    if doubtful:
        turn = AXES.index(a_axis) == 1 if a_axis else known.pop() if len(known) == 1 else None
        if turn is None:
            turn, doubt = by_version(doubtful[0], adapter.config, hparams.architecture)
            warnings += doubt
        turns |= {id(pair): turn for pair in doubtful}
    return [turned(update) if turns.get(id(update)) else update for update in adapter.updates], warnings


def turned(pair: LoraPair | Update) -> LoraPair | Update:
    return pair.take(Piece(pair.name, transpose=True))


def is_turned(pair: LoraPair, width: object) -> bool | None:
    """Return whether a packed parameter's update is (in, out); None where the shape cannot tell."""
    n_out, n_in = pair.shape[-2:]
    if n_out == n_in or width not in (n_out, n_in):
        return None
    return (n_in if pair.name.rpartition(".")[2] in INTO_WIDTH else n_out) == width


def by_version(pair: LoraPair, config: dict, architecture: str) -> tuple[bool, list[str]]:
    """Return whether ``pair``, whose shape does not tell, is (in, out), and a warning where transformers' version
    matters too."""
    where = f"{pair.name}: {pair.shape[-2:]} could lie either way"
    version, ways = version_of(config), ARCHITECTURES[architecture].packed_experts
    if version is None:
        first = is_turned_by(FIRST, ways[0])
        change = next(v for v in (SWAPPED, FIXED) if is_turned_by(v, ways[0]) != first)
        raise UsageError(
            f"{where}, and adapter_config.json does not say which PEFT saved it: give {FLAG} {AXES[first]}, as PEFT "
            f"{dotted(FIRST)} saves {printable(architecture, 40)}, or {FLAG} {AXES[not first]}, as {dotted(change)} "
            "does"
        )
    turns = [is_turned_by(version, way) for way in ways]
    newest = turns[0]
    if len(set(turns)) == 1:
        return newest, []
    advice = f"{FLAG} {AXES[newest]} if it was trained with transformers 5, {FLAG} {AXES[not newest]} if with 4"
    if version < SWAPPED:
        raise UsageError(f"{where}: give {advice}")
    return newest, [f"{where}: read as trained with transformers 5; {advice}"]


def is_turned_by(version: Version, stored: Stored) -> bool:
    """Return whether a version of PEFT saves the update of a parameter that is stored so as (in, out)."""
    if version < SWAPPED:
        a_spans_first_axis = True
    else:
        a_spans_first_axis = stored.declared == (version >= FIXED)
    return a_spans_first_axis != stored.in_out


def version_of(config: dict) -> Version | None:
    """Return the version of PEFT that saved an adapter; None where it does not say, or between two that differ.

    The versions that know ``target_parameters`` but do not name themselves are 0.17.
    """
    text = config.get("peft_version")
    if text is None:
        return FIRST if "qalora_group_size" in config else None
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?P<before>\.?(dev|rc|a|b))?", text)
    if match is None:
        return None
    version = tuple(int(part) for part in match.groups()[:3])
    return None if match["before"] and version in (SWAPPED, FIXED) else version


def dotted(version: Version) -> str:
    return ".".join(map(str, version))
