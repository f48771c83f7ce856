"""New tokens: what an adapter's tokenizer files add to the base's vocabulary, and the rows of the weights that go with
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_gguf.adapters.adapter_config import read_json
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Replaced, Update
from lora_gguf.errors import MalformedError, MismatchError, printable
from lora_gguf.files.gguf_writer import key_value
from lora_gguf.files.lazy_array import contiguous

MAX_TOKENS = 1 << 24
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
FILLER_SCORE = -1000.0
# names of tokens that only fill the vocabulary up
FILLER = re.compile(
    r"\[(PAD-?|unused_?|control_?|reserved_?)\d+\]|<pad_?\d+>|<special_\d+>"
    r"|<[|\uff5c]?(unused|reserved|extra|dummy|place.?holder)[^>]*>",
    re.IGNORECASE,
)

OTHER_TOWERS = re.compile(r"<(image|audio|video)_\w+>")


@dataclass(frozen=True)
class Token:
    """A token that a tokenizer has beyond the base's: ``special`` ones are never part of a text, ``learned`` ones are
    made of others by its merges, the rest were added whole."""

    text: str
    special: bool
    learned: bool = False

    @property
    def type(self) -> int:
        return NORMAL if self.learned else CONTROL if self.special else USER_DEFINED


def added_tokens(directory: Path) -> dict[int, Token]:
    """Return the tokens that the tokenizer files in ``directory`` list as added, by id; empty where there are no such
    files.
    """
    found: dict[int, Token] = {}
    for name, read in READERS.items():
        if (directory / name).is_file():
            try:
                found.update(read(read_json(directory / name, MAX_JSON)))
            except (AttributeError, KeyError, TypeError, ValueError):
                raise MalformedError(f"{name}: expected added tokens with ids and texts: download it again") from None
    strange = [token_id for token_id in found if not 0 <= token_id < MAX_TOKENS]
    if strange:
        raise MalformedError(
            f"tokenizer files: token id {strange[0]}: expected 0 to {MAX_TOKENS - 1}: download them again"
        )
    return found


MAX_JSON = 256 << 20


def _token(text: Any, special: Any) -> Token:
    if not isinstance(text, str) or not isinstance(special, bool):
        raise TypeError
    return Token(text, special)


def _from_added(data: dict) -> dict[int, Token]:
    return {
        _id(token_id): _token(text, text.startswith(("<|", "<")) and text.endswith(">"))
        for text, token_id in data.items()
    }


def _from_config(data: dict) -> dict[int, Token]:
    entries = data.get("added_tokens_decoder") or {}
    return {int(key): _token(entry["content"], entry.get("special", False)) for key, entry in entries.items()}


def _from_tokenizer(data: dict) -> dict[int, Token]:
    entries = data.get("added_tokens") or []
    return {_id(entry["id"]): _token(entry["content"], entry.get("special", False)) for entry in entries}


def _id(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


# file -> how its added tokens are read; later files know more
READERS: dict[str, Callable[[dict], dict[int, Token]]] = {
    "added_tokens.json": _from_added,
    "tokenizer_config.json": _from_config,
    "tokenizer.json": _from_tokenizer,
}


def learned_tokens(directory: Path, first: int) -> tuple[dict[int, Token], list[str]]:
    """Return the tokens from id ``first`` on that the tokenizer in ``directory`` learned rather than added, and its
    merges.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}, []
    try:
        model = read_json(path, MAX_JSON).get("model") or {}
        vocabulary = model.get("vocab") or {}
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        found = {i: Token(text, False, True) for text, i in pairs if _id(i) >= first and isinstance(text, str)}
        return found, [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise MalformedError(f"{path.name}: expected a vocabulary and merges: download it again") from None


def last_token(directory: Path) -> int:
    """Return the largest id of the tokens that were added to a tokenizer of text: vision towers have tokens of their
    own.
    """
    return max(
        (i for i, token in added_tokens(directory).items() if not OTHER_TOWERS.fullmatch(token.text)), default=-1
    )


def first_rows(update: LoraPair | Update, n_rows: int) -> LoraPair | Update:
    """Return an embedding's or head's update without what it has beyond ``n_rows`` rows."""
    if isinstance(update, LoraPair):
        return replace(update, b=contiguous(update.b[:n_rows]))
    if not isinstance(update, Replaced):
        return update
    if update.only is None:
        return _replaced(update, update.values[:n_rows], None, min(n_rows, len(update.values)))
    kept = update.only < n_rows
    return _replaced(update, update.values[kept], update.only[kept], n_rows)


def grown(
    update: LoraPair | Update, n_rows: int, original: np.ndarray | None
) -> tuple[LoraPair | Update, np.ndarray | None]:
    """Return an embedding's or head's update cut to the base's ``n_rows``, and the rows beyond them, whole: (k, cols)
    f32.

    ``original`` is what the adapter's base had after its vocabulary was resized, if the adapter holds it.
    """
    if isinstance(update, LoraPair):
        return _grown_pair(update, n_rows, original)
    if not isinstance(update, Replaced) or (update.only is None and len(update.values) <= n_rows):
        return update, None
    if update.only is None:
        return _replaced(update, update.values[:n_rows], None, n_rows), update.values[n_rows:]
    new = update.only >= n_rows
    if not new.any() and (original is None or len(original) <= n_rows):
        return update, None
    n_new = max(int(update.only.max()) + 1, 0 if original is None else len(original)) - n_rows
    rows = np.full((n_new, update.values.shape[1]), np.nan, np.float32)
    if original is not None:
        rows[: len(original) - n_rows] = original[n_rows:]
    rows[update.only[new] - n_rows] = update.values[new]
    if np.isnan(rows).any():
        raise MismatchError(
            f"{update.name}: some new tokens have no weights in the adapter: save its embedding layers too"
        )
    return _replaced(update, update.values[~new], update.only[~new], n_rows), rows


def _grown_pair(pair: LoraPair, n_rows: int, original: np.ndarray | None) -> tuple[LoraPair, np.ndarray | None]:
    n_new = len(pair.b) - n_rows
    if n_new <= 0:
        return pair, None
    if original is None or len(original) < len(pair.b):
        raise MismatchError(
            f"{pair.name}: {n_new} new tokens, whose own embedding is not in the adapter: save it with "
            "save_embedding_layers=True"
        )
    rows = original[n_rows : len(pair.b)] + replace(pair, b=pair.b[n_rows:]).delta()
    return LoraPair(pair.name, pair.a, contiguous(pair.b[:n_rows]), pair.scale, pair.sources), rows


def _replaced(update: Replaced, values: np.ndarray, only: np.ndarray | None, n_rows: int) -> Replaced:
    return Replaced(
        name=update.name,
        shape=(n_rows, values.shape[1]),
        sources=update.sources,
        values=values,
        only=only,
        part=update.part,
    )


def extended(base: Any, tokens: dict[int, Token], n_rows: int, merges: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the base's key/value pairs that change, by key, when its vocabulary has ``n_rows`` tokens, ``tokens``
    among them.

    ``base`` is an open GGUF. A token that takes the place of a filler renames it; other tokens of the base stay as they
    are. Ids without a token are fillers. ``merges`` are those of a tokenizer that learned tokens, the base's first.
    Empty where nothing changes. Raises ``MismatchError`` where the adapter's tokenizer is not the base's with more
    tokens.
    """
    texts = base.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise MismatchError(
            f"{base.label}: expected a vocabulary, found none: new tokens have no place in it: take a GGUF that has one"
        )
    types = list(base.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts))
    types += [NORMAL] * (len(texts) - len(types))
    check_texts(base.label, texts, types, tokens)
    new = {
        i: token for i, token in tokens.items() if i < n_rows and not (i < len(texts) and is_called(token, texts[i]))
    }
    if not new and n_rows <= len(texts):
        return {}
    scores = base.get("tokenizer.ggml.scores")
    more = range(len(texts), n_rows)
    texts, types = texts + [f"[PAD{i}]" for i in more], types + [UNUSED] * len(more)
    scores = scores and list(scores) + [FILLER_SCORE] * len(more)
    least = min(scores) if scores else 0.0
    for i, token in sorted(new.items()):
        texts[i], types[i] = token.text, token.type
        if scores and token.learned:
            least -= 1
            scores[i] = least
    values = {"tokens": (texts, "str"), "token_type": (types, "i32")} | ({"scores": (scores, "f32")} if scores else {})
    if any(token.learned for token in new.values()):
        values |= more_merges(base, merges)
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if (size := f"{base.architecture}.vocab_size") in base.kv:
        found[size] = (len(texts), "u32")
    return {key: key_value(key, *value) for key, value in found.items()}


def more_merges(base: Any, merges: Sequence[str]) -> dict[str, tuple[list[str], str]]:
    """Return the merges of a tokenizer that learned tokens, if the base has any. Raises ``MismatchError`` where they
    differ.
    """
    known = base.get("tokenizer.ggml.merges")
    if not known:
        return {}
    if list(merges[: len(known)]) != known:
        raise MismatchError(
            f"tokenizer.json: expected the merges of {base.label} and more, found others: another "
            "tokenizer: is it the base that the adapter was trained on?"
        )
    return {"merges": (list(merges), "str")}


def is_called(token: Token, text: str) -> bool:
    """Return whether ``text``, as a GGUF has it, is the token's: some tokenizers mark spaces there, or the start of a
    word.
    """
    return token.text in (text, text.replace("\u2581", " "), text.removeprefix("\u2581"))


def check_texts(label: str, texts: list[str], types: list[int], tokens: dict[int, Token]) -> None:
    """Raise ``MismatchError`` where the adapter's tokenizer has another text for a token that the base uses."""
    strange = [
        f"token {token_id}: expected {printable(texts[token_id], 40)!r} as in {label}, found "
        f"{printable(token.text, 40)!r}"
        for token_id, token in sorted(tokens.items())
        if token_id < len(texts)
        and not is_called(token, texts[token_id])
        and not (types[token_id] == UNUSED or FILLER.fullmatch(texts[token_id]))
    ]
    if strange:
        raise MismatchError(
            f"{strange[0]}: the adapter's tokenizer is not that of the base: is it the one it was trained on?", strange
        )
