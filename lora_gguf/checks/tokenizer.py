"""The adapter's tokenizer files beside the base's vocabulary: the same tokens, special tokens, chat template?"""

from __future__ import annotations

from pathlib import Path

from lora_gguf.adapters.adapter_config import read_json
from lora_gguf.checks.remarks import NOTE, OK, WARNING, Remark
from lora_gguf.errors import MalformedError, printable
from lora_gguf.files.base import Base
from lora_gguf.mapping.vocabulary import FILLER, MAX_JSON, added_tokens

TEMPLATE = "chat_template.jinja"
# tokenizer_config.json's name of a special token -> the GGUF key of its id
SPECIAL = {
    "eos_token": "eos_token_id",
    "bos_token": "bos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


def compare_tokenizer(directory: Path, base: Base) -> list[Remark]:
    """Tell what to say of the tokenizer files in ``directory``: one remark for the tokens, the special ones, the
    template.

    ``MalformedError`` where a file is not what its name says.
    """
    texts = base.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        return [Remark("vocabulary", NOTE, f"{base.label} has none to compare with")]
    config = found_json(directory / "tokenizer_config.json")
    remarks = [check(directory, config, base, texts) for check in (compare_tokens, compare_special, compare_template)]
    found = [remark for remark in remarks if remark]
    return found or [Remark("vocabulary", NOTE, "the adapter has no tokenizer files to compare with the base's")]


def found_json(path: Path) -> dict:
    """Return the object in a JSON file, empty where there is no file."""
    return read_json(path, MAX_JSON) if path.is_file() else {}


def compare_tokens(directory: Path, _config: dict, base: Base, texts: list[str]) -> Remark | None:
    """Tell whether each token has the same id."""
    tokens = {token_id: token.text for token_id, token in added_tokens(directory).items()}
    vocabulary = (found_json(directory / "tokenizer.json").get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        tokens = {token_id: text for text, token_id in vocabulary.items() if type(token_id) is int} | tokens
    if not tokens:
        return None
    new = {token_id for token_id in tokens if token_id >= len(texts) or is_filler(texts[token_id], tokens[token_id])}
    other = [token_id for token_id in tokens if token_id not in new and not is_same(texts[token_id], tokens[token_id])]
    if other:
        first = min(other)
        shown = (
            f"token {first} is {printable(texts[first], 30)!r} in {base.label} and "
            f"{printable(tokens[first], 30)!r} here"
        )
        return Remark(
            "vocabulary", WARNING, f"{len(other)} of {len(tokens)} tokens differ ({shown}): is this the adapter's base?"
        )
    if new:
        return Remark("vocabulary", WARNING, f"{len(new)} new tokens, such as {printable(tokens[min(new)], 40)!r}")
    return Remark("vocabulary", OK, f"all {len(tokens)} tokens of the adapter's tokenizer files are the base's")


def tokens_differ(directory: Path, base: Base) -> list[str]:
    """Return a warning where the adapter's tokenizer is another one than the base's; nothing where either has none."""
    texts = base.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts or not (directory / "tokenizer.json").is_file():
        return []
    remark = compare_tokens(directory, {}, base, texts)
    return [f"vocabulary: {remark.text}"] if remark and " tokens differ" in remark.text else []


def is_filler(text: str, other: str) -> bool:
    return text != other and FILLER.fullmatch(text) is not None


def is_same(text: str, other: str) -> bool:
    """Tell whether two tokens are the same: SentencePiece writes a space as an underline of its own."""
    return other in (text, text.replace("\u2581", " "))


def compare_special(_directory: Path, config: dict, base: Base, texts: list[str]) -> Remark | None:
    """Tell whether beginning, end and padding are the same tokens."""
    differing, n_same = [], 0
    for name, key in SPECIAL.items():
        entry, token_id = config.get(name), base.get(f"tokenizer.ggml.{key}")
        wanted = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(wanted, str) and type(token_id) is int and token_id < len(texts):
            same = is_same(texts[token_id], wanted)
            n_same += same
            differing += (
                []
                if same
                else [f"{name} is {printable(wanted, 40)!r}, the base's is {printable(texts[token_id], 40)!r}"]
            )
    if differing:
        level = WARNING if any(line.startswith("eos") for line in differing) else NOTE
        return Remark("special tokens", level, "; ".join(differing))
    return Remark("special tokens", OK, f"the same {n_same} in adapter and base") if n_same else None


def compare_template(directory: Path, config: dict, base: Base, _texts: list[str]) -> Remark | None:
    """Tell whether the adapter was trained with the chat template that the base has."""
    ours, theirs = template_of(directory, config), base.get("tokenizer.chat_template")
    if ours is None:
        return None
    if isinstance(theirs, str) and theirs.split() == ours.split():
        return Remark("chat template", OK, "the same in adapter and base")
    what = "the adapter's is another than the base's" if theirs else "the adapter has one, the base has none"
    file = printable(
        directory / TEMPLATE if (directory / TEMPLATE).is_file() else directory / "tokenizer_config.json", 100
    )
    return Remark("chat template", WARNING, f"{what}: it was trained with its own ({file}); use that at run time")


def template_of(directory: Path, config: dict) -> str | None:
    """Return the adapter's default chat template, or None."""
    path = directory / TEMPLATE
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError):
            raise MalformedError(f"{TEMPLATE}: expected text: download it again") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
