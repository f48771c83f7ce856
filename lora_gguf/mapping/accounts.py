"""What becomes of an adapter in a base: the updates in GGUF terms, and an account of each of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.adapters.lora import EMBEDDING, HEAD, LoraPair
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import MismatchError, printable
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.vocabulary import Token


@dataclass(frozen=True)
class Account:
    """What happened to one adapter tensor: ``outcome`` is applied, ignored or error."""

    tensor: str
    outcome: str
    target: str = ""
    reason: str = ""


class ElsewhereError(MismatchError):
    """Nothing of an adapter belongs to the base: it is for another part of the model. ``accounts`` say so of each
    tensor.
    """

    def __init__(self, message: str, accounts: Iterable[Account] = ()):
        super().__init__(message)
        self.accounts = list(accounts)


def summary(accounts: Iterable[Account], done: str = "applied") -> list[str]:
    """Return what became of an adapter's tensors, a line for each outcome and reason, with the first tensor as an
    example; ``done`` is said of those that were applied.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for account in accounts:
        groups.setdefault((account.outcome, account.reason), []).append(account.tensor)
    return [
        f"adapter tensors: {len(names)} {done if outcome == 'applied' else outcome}"
        + (f": {reason}, such as {printable(names[0], 120)}" if reason else "")
        for (outcome, reason), names in groups.items()
    ]


@dataclass
class Placement:
    """``pairs`` and ``updates`` in GGUF terms, an ``Account`` for each tensor of the adapter, and warnings.

    There is one pair for each tensor at most; of ``updates``, which only a merge can carry out, several may change
    parts of one. ``untied`` says that the base's head is tied to its embedding and the adapter tells them apart, so
    that a merge must give the file an ``output.weight`` of its own, made from the base's ``token_embd.weight``;
    ``tied``, that the base has one tensor for both and this adapter leaves it so.
    ``invocation_tokens`` (aLoRA) say that the adapter is active only after these tokens, so that it can't be merged.
    ``approximations`` gives the relative error of the tensors whose update ``convert`` could not write exactly.
    ``new_rows`` are f32 rows (k, cols) that come after those of the base's embedding and head, for new tokens, and
    ``key_values`` the raw key/value pairs of the vocabulary that take the place of the base's; ``tokens`` are those of
    the adapter's tokenizer, by id. ``sha256`` is what ``identity.adapter_sha256`` found once it was asked.
    """

    pairs: list[LoraPair] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untied: bool = False
    tied: bool = False
    invocation_tokens: list[int] = field(default_factory=list)
    approximations: dict[str, float] = field(default_factory=dict)
    new_rows: dict[str, np.ndarray] = field(default_factory=dict)
    key_values: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[int, Token] = field(default_factory=dict)
    sha256: str = field(default="", init=False, repr=False, compare=False)

    def is_idle(self, factor: float) -> bool:
        """Return whether it changes nothing at ``factor`` times its own scale, as far as that shows without the
        base.
        """
        if self.updates or self.new_rows or self.key_values:
            return not factor and not self.new_rows and not self.key_values
        return not any(factor and pair.scale and pair.a.any() and pair.b.any() for pair in self.pairs)

    @property
    def changes(self) -> list[LoraPair | Update]:
        """Return all that is added to the base's tensors: pairs, then updates of other kinds."""
        return [*self.pairs, *self.updates]

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the embedding or the head changes, so that tokens may have been added."""
        return any(update.name in (HEAD, EMBEDDING) for update in self.changes) or bool(self.new_rows)

    def summary(self) -> list[str]:
        """Return what became of the adapter, in a few lines."""
        errors = sorted(self.approximations.items(), key=lambda item: item[1])
        if not errors:
            return summary(self.accounts, "converted")
        (_, least), (worst, most) = errors[0], errors[-1]
        rank = max(pair.rank for pair in self.pairs if pair.name in self.approximations)
        line = (
            f"approximated at rank {rank}: {len(errors)} tensors, with relative errors from {least:.2g} to "
            f"{most:.2g} ({worst})"
        )
        return [*summary(self.accounts, "converted"), line]

    def as_dict(self) -> dict:
        """Return the same as plain data for JSON: of each tensor of the adapter, and the relative error of approximated
        ones.
        """
        accounts = [vars(account) for account in self.accounts]
        return {"accounts": accounts, "approximations": self.approximations, "warnings": self.warnings}

    def __str__(self) -> str:
        return f"it changes {len({update.name for update in self.changes})} tensors of the base"


def base_shape(name: str, hparams: Hparams) -> tuple[int, ...] | None:
    """Return the shape of a tensor of the base, of its embedding for a head that is tied to it; None where it has none
    such."""
    tensors = hparams.tensors or {}
    if name == HEAD and hparams.tied:
        name = EMBEDDING
    return tuple(tensors[name].shape) if name in tensors else None


def misfit(name: str, shape: tuple[int, ...], hparams: Hparams) -> str | None:
    """Return what keeps an update of ``shape`` from the base's tensor ``name``, or None."""
    expected = base_shape(name, hparams)
    if hparams.tensors is None or expected == shape:
        return None
    return (
        f"{name}: expected {expected}, found {shape}" if expected else f"{name}: expected in {hparams.label}, not found"
    )
