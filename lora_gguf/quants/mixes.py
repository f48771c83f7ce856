"""llama.cpp's quantization mixes: which type each tensor of a model gets under a name such as Q4_K_M.

A mix is a default type and a few exceptions by role of tensor. An exception is a list of (condition, type), of which
the first that holds counts; a condition is a list of words, all of which must be true of the model and the tensor:

    gqa4               at least four query heads share a key/value head
    experts4 experts8  the model has at least four experts; exactly eight (Mixtral)
    early8 early16     in the first eighth, sixteenth of the layers
    middle             in the three quarters in between
    more               in the first or last eighth, or every third layer between: those that gain most from more bits
    first2 first4      among the first two, four tensors of its role
    first8th           among as many of its role as an eighth of the layers
    falcon             the model is a Falcon
    imatrix            there is an importance matrix

and ``!`` negates a word. The facts are those of llama.cpp's quantizer, releases b9190 and v0.5.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lora_gguf.errors import UnsupportedError
from lora_gguf.quants.ggml import BY_NAME, FILE_TYPES, GgmlType

Rules = tuple[tuple[str, str], ...]


class Tensor(Protocol):
    """What a mix asks of a tensor; ``shape`` in numpy's order."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> GgmlType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_cols(self) -> int: ...


class Header(Protocol):
    """What a mix asks of a model's file."""

    architecture: str

    def hparam(self, key: str, default: object = None) -> object: ...


_FIVE_BITS_FOR_MIXTRAL: Rules = (("!falcon experts8", "Q5_K"),)
_TWO_BIT_HEAD: Rules = (("", "Q5_K"),)


def _two_bits(default: str, better: str, attn_output: Rules) -> tuple[str, dict[str, Rules]]:
    """The mixes around two bits a weight share most exceptions; ``better`` is what their sensitive tensors get."""
    return default, {
        "output": _TWO_BIT_HEAD,
        "token_embd": (("", better),),
        "attn_v": (("gqa4", "Q4_K"), ("experts4", "Q4_K"), ("", better)),
        "attn_k": (("experts8", "Q4_K"),),
        "attn_output": (("experts8", "Q5_K"), *attn_output),
        "ffn_down": (("first8th", better),),
    }


# mix -> default type, role -> exceptions
MIXES: dict[str, tuple[str, dict[str, Rules]]] = {
    "F32": ("F32", {}),
    "F16": ("F16", {}),
    "BF16": ("BF16", {}),
    "Q4_0": ("Q4_0", {"ffn_down": (("imatrix early8", "Q4_1"),)}),
    "Q4_1": ("Q4_1", {}),
    "Q5_0": ("Q5_0", {"ffn_down": (("imatrix early8", "Q5_1"),)}),
    "Q5_1": ("Q5_1", {}),
    "Q8_0": ("Q8_0", {"output": (("", "Q8_0"),)}),
    "Q2_K": (
        "Q2_K",
        {
            "attn_v": (("gqa4", "Q4_K"), ("", "Q3_K")),
            "attn_output": (("falcon", "Q2_K"), ("experts8", "Q5_K"), ("", "Q3_K")),
            "ffn_down": (("", "Q3_K"),),
        },
    ),
    "Q2_K_S": ("Q2_K", {"attn_v": (("gqa4", "Q4_K"),), "ffn_down": (("early8", "Q4_K"),)}),
    "Q3_K_S": ("Q3_K", {"attn_output": _FIVE_BITS_FOR_MIXTRAL}),
    "Q3_K_M": (
        "Q3_K",
        {
            "attn_v": (("first2", "Q5_K"), ("", "Q4_K")),
            "attn_output": (("falcon", "Q3_K"), ("experts8", "Q5_K"), ("", "Q4_K")),
            "ffn_down": (("early16", "Q5_K"), ("!falcon", "Q4_K"), ("more", "Q4_K")),
        },
    ),
    "Q3_K_L": (
        "Q3_K",
        {
            "attn_v": (("", "Q5_K"),),
            "attn_output": (("falcon", "Q4_K"), ("experts8", "Q3_K"), ("", "Q5_K")),
            "ffn_down": (("falcon", "Q4_K"), ("", "Q5_K")),
        },
    ),
    "Q4_K_S": (
        "Q4_K",
        {
            "attn_v": (("first4", "Q5_K"),),
            "attn_output": _FIVE_BITS_FOR_MIXTRAL,
            "ffn_down": (("!falcon early8", "Q5_K"),),
        },
    ),
    "Q4_K_M": (
        "Q4_K",
        {
            "attn_v": (("more", "Q6_K"),),
            "attn_output": _FIVE_BITS_FOR_MIXTRAL,
            "ffn_down": (("falcon early16", "Q6_K"), ("falcon more", "Q5_K"), ("!falcon more", "Q6_K")),
        },
    ),
    "Q5_K_S": ("Q5_K", {}),
    "Q5_K_M": ("Q5_K", {"attn_v": (("more", "Q6_K"),), "ffn_down": (("more", "Q6_K"),)}),
    "Q6_K": ("Q6_K", {}),
    "IQ1_S": _two_bits("IQ1_S", "Q2_K", (("", "IQ2_XXS"),)),
    "IQ1_M": _two_bits("IQ1_M", "Q2_K", (("", "IQ2_XXS"),)),
    "IQ2_XXS": _two_bits("IQ2_XXS", "Q2_K", ()),
    "IQ2_XS": _two_bits("IQ2_XS", "Q2_K", ()),
    "IQ2_S": _two_bits("IQ2_XS", "IQ3_S", (("", "IQ3_S"),)),
    "IQ2_M": _two_bits("IQ2_S", "IQ3_S", (("", "IQ3_S"),)),
    "IQ3_XXS": (
        "IQ3_XXS",
        {
            "output": _TWO_BIT_HEAD,
            "token_embd": (("", "IQ3_S"),),
            "attn_v": (("gqa4", "Q4_K"), ("!imatrix", "IQ3_S")),
            "attn_k": (("", "IQ2_S"),),
            "attn_q": (("", "IQ2_S"),),
            "attn_output": (("falcon", "IQ3_XXS"), ("experts8", "Q5_K"), ("", "IQ3_S")),
            "ffn_down": (("!imatrix early8", "Q4_K"), ("!imatrix", "Q3_K")),
        },
    ),
    "IQ3_XS": (
        "IQ3_S",
        {
            "attn_v": (("gqa4", "Q4_K"),),
            "attn_k": (("", "IQ3_XXS"),),
            "attn_q": (("", "IQ3_XXS"),),
            "attn_output": _FIVE_BITS_FOR_MIXTRAL,
            "ffn_gate": (("middle", "IQ3_XXS"),),
            "ffn_up": (("middle", "IQ3_XXS"),),
        },
    ),
    "IQ3_S": ("IQ3_S", {"attn_v": (("gqa4", "Q4_K"),), "attn_output": _FIVE_BITS_FOR_MIXTRAL}),
    "IQ3_M": (
        "IQ3_S",
        {
            "attn_v": (("", "Q4_K"),),
            "attn_output": (("falcon", "IQ3_S"), ("experts8", "Q5_K"), ("", "Q4_K")),
            "ffn_down": (("early8", "Q4_K"), ("experts8 more", "Q4_K")),
        },
    ),
    "IQ4_NL": (
        "IQ4_NL",
        {
            "attn_v": (("gqa4", "Q5_K"),),
            "attn_output": _FIVE_BITS_FOR_MIXTRAL,
            "ffn_down": (("!imatrix early8", "Q5_K"),),
        },
    ),
    "IQ4_XS": (
        "IQ4_XS",
        {
            "attn_v": (("gqa4", "Q5_K"),),
            "attn_output": _FIVE_BITS_FOR_MIXTRAL,
            "ffn_down": (("!imatrix early8", "Q5_K"),),
        },
    ),
    "TQ1_0": ("TQ1_0", {"token_embd": (("", "Q4_K"),)}),
    "TQ2_0": ("TQ2_0", {"token_embd": (("", "Q4_K"),)}),
    "Q1_0": ("Q1_0", {}),
    "Q2_0": ("Q2_0", {"token_embd": (("", "Q4_K"),)}),
    "NVFP4": ("NVFP4", {}),
    "MXFP4_MOE": ("MXFP4", {}),
}
_TWO_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")

# part of a tensor's name -> its role; the first match counts
ROLES = (
    (r"^output\.weight$", "output"),
    (r"^(per_layer_)?token_embd\.weight$", "token_embd"),
    (r"attn_(qkv|kv_b|v)\.weight", "attn_v"),
    (r"attn_k\.weight", "attn_k"),
    (r"attn_q\.weight", "attn_q"),
    (r"attn_output\.weight", "attn_output"),
    (r"ffn_up", "ffn_up"),
    (r"ffn_gate", "ffn_gate"),
    (r"ffn_down", "ffn_down"),
)
# what is small or delicate: norms, routers, convolutions, position embeddings, parts of image and audio towers
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
# general.file_type of a file of mostly one type
_FILE_TYPE_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
# architecture -> number of layers of the model that llama.cpp calls 70B, whose small attn_v gets more bits
_LARGE = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Model:
    """What the choice of types depends on; ``n_layer`` is the header's block_count, head counts those of layer 0."""

    architecture: str
    n_layer: int
    n_head: int = 0
    n_head_kv: int = 0
    n_expert: int = 0

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        llama = self.architecture in ("llama", "llama-embed")
        return self.n_layer == _LARGE.get(self.architecture) and not (
            llama and (self.n_head == self.n_head_kv or self.n_expert == 8)
        )


def model_of(base: Header) -> Model:
    """Return the facts of an open base."""

    def number(key: str, default: int = 0) -> int:
        value = base.hparam(key)
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int else default

    heads = number("attention.head_count")
    return Model(
        base.architecture,
        number("block_count"),
        heads,
        number("attention.head_count_kv", heads),
        number("expert_count"),
    )


def role_of(name: str) -> str:
    """Return what a tensor does in the model, as far as the mixes tell tensors apart; empty where they don't."""
    return next((role for pattern, role in ROLES if re.search(pattern, name)), "")


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a mix changes a tensor's type at all: matrices and stacks of them named weight, but the
    ``KEPT``.
    """
    return any(dim > 1 for dim in shape[:-1]) and name.endswith("weight") and not KEPT.search(name)


def fallback_type(type: GgmlType, n_cols: int) -> GgmlType:
    """Return ``type``, or what takes its place where rows of ``n_cols`` are not whole blocks of it; F16 where nothing
    fits.
    """
    if n_cols % type.block_size == 0:
        return type
    fallback = BY_NAME[type.fallback]
    return fallback if n_cols % fallback.block_size == 0 else BY_NAME["F16"]


def mix_types(mix: str, model: Model, tensors: Iterable[Tensor], *, has_imatrix: bool = False) -> dict[str, GgmlType]:
    """Return the type of each tensor, by name, as ``llama-quantize`` chooses it; ``tensors`` are all of the model's.

    Where that program refuses a row length, the type is F16. Raises ``UnsupportedError`` for an unknown ``mix``.
    """
    if mix not in MIXES:
        raise UnsupportedError(f"--quantize {mix}: expected one of {', '.join(MIXES)}")
    tensors = list(tensors)
    default = BY_NAME[MIXES[mix][0]]
    types = {tensor.name: tensor.type for tensor in tensors}
    for tensor, role, facts in _places(model, tensors, has_imatrix):
        wanted = default
        if default.block_size > 1:
            wanted = fallback_type(BY_NAME[_choose(mix, model, tensor, role, facts)], tensor.n_cols)
        types[tensor.name] = wanted
    return types


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)", name)
    return int(match[1]) if match else -1


def _places(model: Model, tensors: list[Tensor], has_imatrix: bool) -> Iterator[tuple[Tensor, str, set[str]]]:
    """Each tensor that is quantized, with its role and the words that are true of it, in llama.cpp's order."""
    common = {word for word, holds in (
        ("gqa4", model.n_gqa >= 4), ("experts4", model.n_expert >= 4), ("experts8", model.n_expert == 8),
        ("falcon", model.architecture == "falcon"), ("imatrix", has_imatrix),
    ) if holds}  # fmt: skip
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    n_attn_v = sum(role_of(tensor.name) == "attn_v" for tensor in tensors)
    seen: dict[str, int] = {}
    for tensor in sorted(
        tensors, key=lambda tensor: (_layer(tensor.name), tensor.name.encode("utf-8", "surrogateescape"))
    ):
        if not is_quantized(tensor.name, tensor.shape):
            continue
        role = role_of(tensor.name)
        count = seen.get(role, 0)
        seen[role] = count + 1
        by_name = model.n_expert > 1 and role.startswith("ffn_") and _layer(tensor.name) >= 0
        place = _layer(tensor.name) if by_name else count
        facts = common | _position(place, n_attn_v if role == "attn_v" else model.n_layer)
        facts |= {word for word, n in (("first2", 2), ("first4", 4), ("first8th", model.n_layer // 8)) if count < n}
        yield tensor, "output" if role == "token_embd" and tied else role, facts


def _position(i: int, n: int) -> set[str]:
    eighth, last = n // 8, 7 * n // 8
    words = {"early8": i < eighth, "early16": i < n // 16, "middle": eighth <= i < last}
    words["more"] = i < eighth or i >= last or (i - eighth) % 3 == 2
    return {word for word, holds in words.items() if holds}


def _choose(mix: str, model: Model, tensor: Tensor, role: str, facts: set[str]) -> str:
    """The name of the type that ``mix`` gives a tensor, whatever its row length."""
    default, exceptions = MIXES[mix]
    if role == "output":
        return _head_type(mix, model, tensor)
    if mix == "MXFP4_MOE":
        return "MXFP4" if _is_expert(model, tensor, role) else "Q8_0"
    chosen = next((name for words, name in exceptions.get(role, ()) if _hold(words, facts)), default)
    if mix in _TWO_BITS:
        return chosen
    if role == "attn_v" and model.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if role in ("attn_v", "attn_k") and model.n_expert == 8 else chosen


def _hold(words: str, facts: set[str]) -> bool:
    return all((word[1:] not in facts) if word[0] == "!" else word in facts for word in words.split())


def _head_type(mix: str, model: Model, tensor: Tensor) -> str:
    default, exceptions = MIXES[mix]
    if mix == "MXFP4_MOE" or model.architecture == "falcon" or tensor.n_cols % BY_NAME[default].block_size:
        return "Q8_0"
    return exceptions.get("output", (("", "Q6_K"),))[0][1]


def _is_expert(model: Model, tensor: Tensor, role: str) -> bool:
    stacked = len(tensor.shape) > 2 and tensor.shape[-3] > 1
    return stacked and (model.architecture != "bailingmoe3" or role.startswith("ffn_"))


def requires_importance(mix: str, name: str, type: GgmlType) -> bool:
    """Return whether llama.cpp refuses to quantize the tensor to ``type`` without an importance matrix."""
    if role_of(name) in ("output", "token_embd"):
        return False
    low_bit = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
    return type.name in low_bit or (mix == "Q2_K_S" and type.name == "Q2_K")


def file_type_of(weights: Mapping[str, int], base: int | None = None) -> int:
    """Return ``general.file_type`` for a file with so many weights of each type (by name).

    ``base``, the value that the file had before, stays while most weights are still of that mix's default type.
    """
    most = max(weights, key=lambda name: weights[name], default="F32")
    kept = next((mix for mix, number in FILE_TYPES.items() if number == base), None)
    if kept in MIXES and MIXES[kept][0] == most:
        return base
    return FILE_TYPES.get(_FILE_TYPE_NAMES.get(most, most), FILE_TYPES["F32"])
