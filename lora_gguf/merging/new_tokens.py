"""Several adapters that each bring new tokens: one vocabulary of all, where their tokens agree or differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_gguf.adapters.lora import EMBEDDING
from lora_gguf.errors import MismatchError, printable
from lora_gguf.files.base import Base
from lora_gguf.mapping.accounts import Placement
from lora_gguf.mapping.vocabulary import Token, extended

Scaled = tuple[Placement, float]


def with_one_vocabulary(base: Base, placements: Sequence[Scaled]) -> list[Scaled]:
    """Return ``placements`` with the new tokens of all in the first that has some; the others have none.

    A token that several bring gets the mean of their rows, which are said to differ in a warning. Raises
    ``MismatchError`` where a row has no token that tells whose it is, or the adapters learned merges.
    """
    bringing = [placement for placement, _ in placements if placement.new_rows]
    if len(bringing) < 2:
        return list(placements)
    n_old = base.tensors[EMBEDDING].shape[0]
    texts = [new_texts(placement, n_old, base.label) for placement in bringing]
    together = list(dict.fromkeys(text for found in texts for text in found))
    rows = {
        name: summed(
            [(found, placement.new_rows[name]) for found, placement in zip(texts, bringing, strict=True)], together
        )
        for name in bringing[0].new_rows
    }
    first, *others = bringing
    tokens = settled(bringing, together, n_old)
    new = replace(first, new_rows=rows, key_values=extended(base, tokens, n_old + len(together)))
    if twice := sorted(
        {text for i, found in enumerate(texts) for text in found for other in texts[:i] if text in other}
    ):
        new.warnings = [
            *first.warnings,
            f"{len(twice)} new tokens are in several adapters, such as {printable(twice[0], 40)!r}: they get the mean "
            "of their rows",
        ]
    changed = {id(first): new, **{id(other): replace(other, new_rows={}, key_values={}) for other in others}}
    return [(changed.get(id(placement), placement), scale) for placement, scale in placements]


def new_texts(placement: Placement, n_old: int, label: str) -> list[str]:
    """Return the texts of a placement's new tokens, in the order of its rows."""
    n = len(placement.new_rows[EMBEDDING])
    tokens = [placement.tokens.get(i) for i in range(n_old, n_old + n)]
    texts = [token.text for token in tokens if token is not None and not token.learned]
    if len(texts) < n or len(set(texts)) < n:
        raise MismatchError(
            f"{label}: {EMBEDDING}: two adapters add tokens, and not all of them have a name of their own: merge one, "
            "then the other into the result"
        )
    return texts


def summed(parts: list[tuple[list[str], np.ndarray]], together: list[str]) -> np.ndarray:
    """Return a row for each text of ``together``: the mean of those that the parts have for it."""
    rows = np.zeros((len(together), parts[0][1].shape[1]), np.float64)
    counts = np.zeros(len(together))
    for texts, values in parts:
        index = [together.index(text) for text in texts]
        rows[index] += values
        counts[index] += 1
    return (rows / counts[:, None]).astype(np.float32)


def settled(bringing: Sequence[Placement], together: list[str], n_old: int) -> dict[int, Token]:
    """Return all tokens by their ids in the one vocabulary; those of the base are as each adapter has them."""
    found: dict[int, Token] = {}
    by_text: dict[str, Token] = {}
    for placement in bringing:
        for i, token in placement.tokens.items():
            if i < n_old and found.setdefault(i, token).text != token.text:
                raise MismatchError(
                    f"token {i}: one adapter calls it {printable(found[i].text, 40)!r}, another "
                    f"{printable(token.text, 40)!r}: merge one, then the other into the result"
                )
            by_text.setdefault(token.text, token)
    return found | {n_old + i: by_text[text] for i, text in enumerate(together)}
