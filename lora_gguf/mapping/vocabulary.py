"""New tokens: what an adapter's tokenizer files add to the base's vocabulary, and the rows of the weights that go with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_gguf.adapters.adapter_config import read_json
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Replaced, Update
from lora_gguf.errors import MalformedError, MismatchError, printable
from lora_gguf.files.gguf_writer import key_value

MAX_TOKENS = 1 << 24
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# names of tokens that only fill the vocabulary up
FILLER = re.compile(r"\[PAD-?\d+\]|<(\|?)(unused|reserved|extra|dummy)[^>]*>|<pad_?\d+>|\[unused\d+\]", re.IGNORECASE)


@dataclass(frozen=True)
class Token:
    """A token that was added to a tokenizer; ``special`` ones are never part of a text."""

    text: str
    special: bool


def added_tokens(directory: Path) -> dict[int, Token]:
    """The tokens that the tokenizer files in ``directory`` list as added, by id; empty where there are no such files."""
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


def _token(text, special) -> Token:
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


def _id(value) -> int:
    if type(value) is not int:
        raise TypeError
    return value


# file -> how its added tokens are read; later files know more
READERS: dict[str, Callable[[dict], dict[int, Token]]] = {
    "added_tokens.json": _from_added,
    "tokenizer_config.json": _from_config,
    "tokenizer.json": _from_tokenizer,
}


def grown(
    update: LoraPair | Update, n_rows: int, original: np.ndarray | None
) -> tuple[LoraPair | Update, np.ndarray | None]:
    """An embedding's or head's update cut to the base's ``n_rows``, and the rows beyond them, whole: (k, cols) f32.

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
    if original is None or len(original) != len(pair.b):
        raise MismatchError(
            f"{pair.name}: {n_new} new tokens, whose own embedding is not in the adapter: save it with save_embedding_layers=True"
        )
    rows = original[n_rows:] + np.float32(pair.scale) * (pair.b[n_rows:] @ pair.a)
    return LoraPair(pair.name, pair.a, np.ascontiguousarray(pair.b[:n_rows]), pair.scale, pair.sources), rows


def _replaced(update: Replaced, values: np.ndarray, only: np.ndarray | None, n_rows: int) -> Replaced:
    return Replaced(
        name=update.name,
        shape=(n_rows, values.shape[1]),
        sources=update.sources,
        values=values,
        only=only,
        part=update.part,
    )


def extended(base, tokens: dict[int, Token], n_rows: int) -> dict[str, bytes]:
    """The base's key/value pairs that change, by key, when its vocabulary has ``n_rows`` tokens, ``tokens`` among them.

    ``base`` is an open GGUF. A token that takes the place of a filler renames it; other tokens of the base stay as they are.
    Ids without a token are fillers. Raises ``MismatchError`` where a token of the base has another text.
    """
    texts = base.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise MismatchError(f"{base.label}: expected a vocabulary, found none: new tokens have no place in it")
    types = list(base.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts))
    scores = base.get("tokenizer.ggml.scores")
    check_texts(base.label, texts, types, tokens)
    texts = list(texts) + [f"[PAD{i}]" for i in range(len(texts), n_rows)]
    types += [UNUSED] * (len(texts) - len(types))
    for token_id, token in tokens.items():
        if token_id < len(texts) and texts[token_id] != token.text:
            texts[token_id] = token.text
            types[token_id] = CONTROL if token.special else USER_DEFINED
    found = {"tokenizer.ggml.tokens": key_value("tokenizer.ggml.tokens", texts, "str")}
    found["tokenizer.ggml.token_type"] = key_value("tokenizer.ggml.token_type", types, "i32")
    if scores:
        scores = list(scores) + [-1000.0] * (len(texts) - len(scores))
        found["tokenizer.ggml.scores"] = key_value("tokenizer.ggml.scores", scores, "f32")
    size = f"{base.architecture}.vocab_size"
    if size in base.kv:
        found[size] = key_value(size, len(texts), "u32")
    return found


def check_texts(label: str, texts: list[str], types: list[int], tokens: dict[int, Token]) -> None:
    """Raise ``MismatchError`` where the adapter's tokenizer has another text for a token that the base uses."""
    strange = [
        f"token {token_id}: expected {printable(texts[token_id], 40)!r} as in {label}, found {printable(token.text, 40)!r}"
        for token_id, token in sorted(tokens.items())
        if token_id < len(texts)
        and token.text not in (texts[token_id], texts[token_id].replace("\u2581", " "))
        and not (token_id < len(types) and types[token_id] == UNUSED or FILLER.fullmatch(texts[token_id]))
    ]
    if strange:
        raise MismatchError(f"{strange[0]}: the adapter's tokenizer is not that of the base", strange)
