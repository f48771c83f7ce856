"""Is this the base that the adapter was trained on? Names, classes and sizes, where both sides have them.

Shapes cannot tell: many models have the same. Names can, if they are read as loosely as they are written:
"SmolLM2-135M- Instruct" is called "Smollm2 135M 8k Lc100K Mix1 Ep2" in its GGUF, and bitsandbytes, Unsloth and every
quantizer add words. So families ("smollm"), their versions (2) and sizes (135M) are compared, and nothing else of a
name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_directory, adapter_name
from lora_gguf.adapters.adapter_config import read_config
from lora_gguf.checks.remarks import NOTE, OK, WARNING, Remark
from lora_gguf.checks.tokenizer import tokens_differ
from lora_gguf.errors import printable
from lora_gguf.files.base import Base, split_name
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.architectures import ARCHITECTURES, VARIANTS
from lora_gguf.mapping.towers import CLIP
from lora_gguf.text import count_text

TEXT = 200  # characters of a text from a file that are shown

# a family's word in a name -> the GGUF architectures of its models
FAMILIES = {
    "llama": "llama|deci|nemotron|mistral", "vicuna": "llama", "smollm": "llama|smollm", "mistral": "llama|mistral",
    "ministral": "llama|mistral", "codestral": "llama|mistral|mamba", "devstral": "llama|mistral",
    "magistral": "llama|mistral", "mixtral": "llama", "qwen": "qwen|rwkv6qwen|arwkv", "qwq": "qwen", "gemma": "gemma",
    "phi": "phi|llama", "falcon": "falcon|llama|mamba", "granite": "granite|llama|starcoder|bert", "gpt2": "gpt2",
    "pythia": "gptneox", "gptneox": "gptneox", "bloom": "bloom", "starcoder": "starcoder", "olmo": "olmo",
    "glm": "chatglm|glm", "chatglm": "chatglm|glm", "internlm": "internlm|llama|qwen", "baichuan": "baichuan",
    "mpt": "mpt", "stablelm": "stablelm", "exaone": "exaone|llama", "nemotron": "nemotron|llama|deci",
    "minicpm": "minicpm|llama|qwen", "lfm": "lfm", "ernie": "ernie", "hunyuan": "hunyuan", "jamba": "jamba",
    "mamba": "mamba|falcon", "deepseek": "deepseek|llama|qwen", "openelm": "openelm", "bitnet": "bitnet|llama",
    "dbrx": "dbrx", "grok": "grok", "orion": "orion",
}  # fmt: skip
_SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:[._]\d+)?)([mb])")
_WORD = re.compile(r"([a-z]+?)(\d+(?:\.\d+)?)?")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)?)")
_CACHED = re.compile(r"models--[^/\\]+--([^/\\]+)")
SAME_SIZE = 1.35  # "1B" and "1.2B"
SAME_COUNT = 2.0  # names count some of the parameters, or round
_ANY = {"", "model", "models", "base", "basemodel", "merged", "final", "output", "hub", "snapshot"}
_TASKS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


@dataclass(frozen=True)
class Traits:
    """What a name says: families with the version that follows each ("" where none does), the "v0.3" in it, and sizes
    in parameters. ``attached``: the families whose version is part of the word.
    """

    families: dict[str, str]
    attached: frozenset[str]
    versions: frozenset[str]
    sizes: tuple[float, ...]


def traits(name: str) -> Traits:
    """Read what ``name``, a Hub id, a path or the name in a GGUF, says of a model."""
    words = re.split(r"[^a-z0-9.]+", last_part(name).lower().replace("gpt-2", "gpt2").replace("gpt-neox", "gptneox"))
    words = [word.strip(".") for word in words if word.strip(".")]
    families: dict[str, str] = {}
    attached, versions, sizes = set(), set(), []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if match := _SIZE.fullmatch(word.replace("_", ".")):
            sizes.append(int(match[1] or 1) * float(match[2]) * {"m": 1e6, "b": 1e9}[match[3]])
        elif word in FAMILIES:
            follows = _VERSION.fullmatch(after)
            families[word] = _plain(follows[1]) if follows else ""
        elif (match := _WORD.fullmatch(word)) and family_of(match[1]):
            follows = None if match[2] else _VERSION.fullmatch(after)
            families[match[1]] = _plain(match[2] or (follows[1] if follows else ""))
            attached |= {match[1]} if match[2] else set()
        elif word.startswith("v") and (match := _VERSION.fullmatch(word)):
            versions.add(_plain(match[1]))
    return Traits(families, frozenset(attached), frozenset(versions) - set(families.values()), tuple(sizes))


def last_part(name: str) -> str:
    """Return the last part of a Hub id or a path; of a folder of the Hub's cache the model's name."""
    cached = _CACHED.search(name)
    return cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def family_of(word: str) -> str | None:
    """Return the family that a word belongs to: ``tinyllama`` to llama."""
    return next((known for known in FAMILIES if word == known or (len(known) > 4 and known in word)), None)


def _plain(number: str) -> str:
    return number.removesuffix(".0")


def disagreement(one: Traits, other: Traits) -> str:
    """Tell in what two names cannot mean the same model; '' where they can."""
    if one.families and other.families and not one.families.keys() & other.families.keys():
        return f"{' and '.join(one.families)} is not {' or '.join(other.families)}"
    if one.sizes and other.sizes and not any(_near(a, b, SAME_SIZE) for a in one.sizes for b in other.sizes):
        return "another size"
    for family in one.families.keys() & other.families.keys():
        a, b = one.families[family], other.families[family]
        if a != b and ((a and b) or family in one.attached | other.attached):
            return f"another {family}"
    if one.versions and other.versions and not one.versions & other.versions:
        return "another version"
    return ""


def _near(a: float, b: float, factor: float) -> bool:
    return max(a, b) <= factor * min(a, b)


def agrees(one: Traits, other: Traits) -> bool:
    return bool(one.families.keys() & other.families.keys()) and not disagreement(one, other)


def names_of(base: Base) -> list[str]:
    """Return what a GGUF calls itself and what it was made of, and its file's name."""
    split = split_name(base.path.name)
    own = [base.get("general.name"), _label(base), split[0] if split else base.path.name.removesuffix(".gguf")]
    for i in range(min(number if type(number := base.get("general.base_model.count")) is int else 0, 8)):
        own += [base.get(f"general.base_model.{i}.{key}") for key in ("repo_url", "name")]
    return list(dict.fromkeys(name for name in own if isinstance(name, str) and name))


def _label(base: Base) -> str:
    parts = [base.get(f"general.{key}") for key in ("basename", "size_label", "finetune", "version")]
    return " ".join(part for part in parts if isinstance(part, str)) if isinstance(parts[0], str) else ""


def stated_base(path: str | os.PathLike[str]) -> tuple[str, dict]:
    """Return the model that an adapter says it was trained on, and its configuration (empty for a GGUF)."""
    if Path(path).is_file() and Path(path).suffix == ".gguf":
        with GgufReader(path) as reader:
            return base_model_of(reader), {}
    config = read_config(adapter_directory(path))
    return str(config.get("base_model_name_or_path", ""))[:1000], config


def base_model_of(base: Base | GgufReader) -> str:
    """Return OWNER/NAME or the name of the first model that the file says it was made of."""
    owner, name = (text(base.get(f"general.base_model.0.{key}", "")) for key in ("organization", "name"))
    address = text(base.get("general.base_model.0.repo_url", ""))
    return address.removeprefix("https://huggingface.co/") or (f"{owner}/{name}" if owner and name else name)


def text(value: object) -> str:
    return printable(value, TEXT) if isinstance(value, str) else ""


def kinship(path: str | os.PathLike[str], base: Base) -> list[Remark]:
    """Tell whether the adapter at ``path`` was trained on ``base``, by its name and by its class: agree, disagree,
    cannot tell.
    """
    if base.architecture == CLIP:
        return []  # a tower, which is named after many models
    stated, config = stated_base(path)
    return [by_name(stated, base), *by_class(config, base)]


def kin_warnings(adapters: Sequence[tuple[str | os.PathLike[str], float]], base: Base) -> list[str]:
    """Tell what a merge says where an adapter's base is another model, or has another vocabulary."""
    found = []
    for path, _ in adapters:
        remarks = [remark.text for remark in kinship(path, base) if remark.level == WARNING]
        if not (Path(path).is_file() and Path(path).suffix == ".gguf"):
            remarks += tokens_differ(adapter_directory(path), base)
        found += [f"{adapter_name(path)}: {text}" for text in remarks]
    return found


def by_name(stated: str, base: Base) -> Remark:
    """Return what the names say."""
    if not stated:
        return Remark("base", NOTE, "cannot tell: the adapter does not say what it was trained on")
    said, names = traits(stated), names_of(base)
    shown, known = printable(stated, 100), [(name, traits(name)) for name in names]
    other = next(filter(None, against_facts(said, base)), "")
    if not other:
        if same := next((name for name, found in known if agrees(said, found) or _same(stated, name)), None):
            return Remark("base", OK, f"the adapter says {shown}, the base {printable(same, 100)}: they agree")
        told = [(name, why) for name, found in known if (why := disagreement(said, found))]
        if not told:
            return Remark("base", NOTE, f"cannot tell: the adapter says {shown}, and nothing in the base's names does")
        other = f"{printable(told[0][0], 100)}: {told[0][1]}"
    return Remark("base", WARNING, f"trained on {shown}, but the base is {other}: is this the adapter's base?")


def _same(one: str, other: str) -> bool:
    a, b = (re.sub(r"[^a-z0-9]+", "", last_part(name).lower()) for name in (one, other))
    return a == b and a not in _ANY


def against_facts(said: Traits, base: Base) -> Iterator[str]:
    """Tell what of the base itself, whatever it is called, is not as a name says: its architecture, its size."""
    allowed = "|".join(FAMILIES[family_of(word) or word] for word in said.families)
    if allowed and base.architecture and not re.match(allowed, base.architecture):
        yield f"of the architecture {printable(base.architecture, 40)}"
    n_parameters = sum(info.n_elements for info in base.tensors.values())
    if said.families and said.sizes and not any(_near(size, n_parameters, SAME_COUNT) for size in said.sizes):
        yield f"of {count_text(n_parameters)} parameters"


def by_class(config: dict, base: Base) -> Iterator[Remark]:
    """Tell what the class says that PEFT wrapped, and the task."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    known = architectures_of(name) if isinstance(name, str) else set()
    if known:
        fits = base.architecture in known
        text = f"trained as {printable(name, 60)}, the base is {printable(base.architecture, 40)}"
        yield Remark("class", *((OK, text) if fits else (WARNING, f"{text}: is this the adapter's base?")))
    task = config.get("task_type")
    if task in _TASKS and not any(tensor.startswith("cls.") for tensor in base.tensors):
        yield Remark("task", WARNING, f"trained for {task}, and the base has no head for classes: it writes text")


def architectures_of(name: str) -> set[str]:
    """Return the GGUF architectures that models of a class of transformers become, whatever their head."""
    stem = _stem(name)
    found = {architecture for architecture, row in ARCHITECTURES.items() if stem in map(_stem, row.hf)}
    return found | {other for (one, _), other in VARIANTS.items() if one in found}


def _stem(name: str) -> str:
    return re.sub(r"(For[A-Z]\w+|LMHeadModel|DoubleHeadsModel|Model)$", "", name).lower()
