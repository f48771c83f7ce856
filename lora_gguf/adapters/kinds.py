"""The kinds of adapter that PEFT saves: from the tensors of one module to its updates.

One function a ``peft_type``, in ``KINDS``. Each takes a ``Module`` and returns the updates of its weight (and bias) in
Hugging Face's layout, (out, in). Formulas are those of the papers that ``updates`` names, as PEFT merges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.patterns import first_match
from lora_gguf.adapters.rotations import boft_blocks, butterfly, oft_blocks
from lora_gguf.adapters.updates import (
    Added,
    Dora,
    DoraOfColumns,
    Hadamard,
    Kronecker,
    Replaced,
    Rotated,
    Scaled,
    Update,
)
from lora_gguf.adapters.variants import unpacked
from lora_gguf.errors import MalformedError, UnsupportedError
from lora_gguf.files.lazy_array import contiguous, made, stack


@dataclass
class Module:
    """The tensors of one module by factor (``lora_A``), what each is called in the file, and what all modules share."""

    path: str
    factors: dict[str, np.ndarray]
    names: dict[str, str]
    config: dict
    shared: dict[str, np.ndarray]

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the weight's update; a bias is an update of its own."""
        return tuple(name for factor, name in self.names.items() if not factor.endswith(".bias"))

    def matrices(self, *wanted: str) -> list[np.ndarray]:
        """Return the factors called ``wanted``, all of them matrices with no empty side."""
        missing = [name for name in wanted if name not in self.factors]
        if missing:
            raise self.malformed(f"expected {' and '.join(wanted)}, found {', '.join(self.factors)}")
        found = [self.factors[name] for name in wanted]
        if any(array.ndim != 2 or 0 in array.shape for array in found):
            raise self.malformed(f"expected matrices, found {', '.join(str(array.shape) for array in found)}")
        return found

    def flatten(self) -> None:
        """Make a convolution's factors matrices: (r, in, height, width) is (r, in * height * width)."""
        a, b = (self.factors.get(name) for name in ("lora_A", "lora_B"))
        if a is not None and b is not None and a.ndim == b.ndim > 2 and b.size and b.size == len(b) * b.shape[1]:
            self.factors |= {"lora_A": a.reshape(len(a), -1), "lora_B": b.reshape(len(b), -1)}

    def refuse_convolution(self, kind: str) -> None:
        """Raise ``UnsupportedError`` where the module is a convolution, which the factors of ``kind`` show."""
        if {"hada_t1", "hada_t2", "lokr_t2"} & self.factors.keys() or any(f.ndim == 4 for f in self.factors.values()):
            raise UnsupportedError(f"{self.path}: {kind} of a convolution: merge it with PEFT")

    def product(self, left: str, right: str) -> tuple[np.ndarray, np.ndarray]:
        """Return two factors that multiply: ``left`` (m, r), ``right`` (r, n)."""
        b, a = self.matrices(left, right)
        if b.shape[1] != a.shape[0]:
            raise self.malformed(f"{right} {a.shape} and {left} {b.shape} do not multiply")
        return b, a

    def malformed(self, what: str) -> MalformedError:
        return MalformedError(f"{self.path}: {what}: save the adapter again")


UNSAID_DORA = (
    "magnitudes, but adapter_config.json has no use_dora: torchtune saves it so, those of q_proj and k_proj in a wrong "
    "order: name its adapter_model.pt; if another program saved it, add use_dora: true"
)
Found = list[LoraPair | Update]


def pattern_value(pattern: dict | None, path: str, default: Any) -> Any:
    """Return the value of the first key of ``pattern`` that matches ``path`` as in PEFT; else ``default``."""
    if not pattern:
        return default
    key = first_match(pattern, path)
    return default if key is None else pattern[key]


def number(config: dict, field: str) -> Any:
    if field not in config:
        raise MalformedError(f"adapter_config.json: {field}: expected a number, found nothing: correct the file")
    return config[field]


def scale_of(path: str, rank: int, config: dict, alpha_field: str = "lora_alpha") -> float:
    """Return PEFT's scale of a module: alpha / r, or alpha / sqrt(r); ``rank`` is what the tensors have and must be
    r.
    """
    expected = pattern_value(config.get("rank_pattern"), path, number(config, "r"))
    if expected != rank:
        raise MalformedError(
            f"{path}: expected rank {expected} (adapter_config.json), found {rank}: the files are not of one adapter"
        )
    alpha = pattern_value(config.get("alpha_pattern"), path, number(config, alpha_field))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def lora(module: Module) -> Found:
    """Return the updates of LoRA and rsLoRA, on linear layers and embeddings, with DoRA's magnitudes and a bias beside
    B.
    """
    if ".experts." in module.path and any(factor.ndim == 3 for factor in module.factors.values()):
        return [stacked(module)]
    module.flatten()
    try:
        module.factors |= unpacked(module.path, module.factors, module.config)
    except ValueError as error:
        raise module.malformed(str(error)) from None
    embedding = "lora_embedding_A" in module.factors or "lora_embedding_B" in module.factors
    b, a = module.product(*(("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")))
    scale = scale_of(module.path, len(a), module.config)
    if embedding:
        a, b = contiguous(b.T), contiguous(a.T)
    pair = LoraPair(module.path, a, b, scale, module.sources)
    magnitude = module.factors.get("lora_magnitude_vector")
    if magnitude is not None and "use_dora" not in module.config:
        raise MalformedError(f"{module.path}: {UNSAID_DORA}")
    if bool(module.config.get("use_dora")) != (magnitude is not None):
        raise module.malformed("use_dora of adapter_config.json and the magnitude vectors do not agree")
    found: Found = [pair if magnitude is None else dora(module, pair, magnitude, embedding)]
    bias = module.factors.get("lora_B.bias")
    if bias is not None:
        found.append(added_bias(module, bias * np.float32(scale), len(b)))
    return found


def stacked(module: Module) -> LoraPair:
    """Return the update of all experts in one, as Tinker saves it: A (E, r, in) and B (E, out, r), one of them perhaps
    (1, …) and shared by all."""
    a, b = (module.factors.get(name, np.empty(0, np.float32)) for name in ("lora_A", "lora_B"))
    n = max(len(a), len(b))
    if not a.ndim == b.ndim == 3 or {len(a), len(b)} - {1, n} or a.shape[1] != b.shape[2] or not a.size * b.size:
        raise module.malformed(f"lora_A {a.shape} and lora_B {b.shape} do not multiply, expert by expert")
    scale = scale_of(module.path, a.shape[1], module.config)
    a, b = (x if len(x) == n else stack([x[0]] * n, (n, *x.shape[1:])) for x in (a, b))
    return LoraPair(module.path, a, b, scale, module.sources)


def dora(module: Module, pair: LoraPair, magnitude: np.ndarray, embedding: bool) -> Dora | DoraOfColumns:
    if embedding:
        return dora_of_embedding(module, pair, magnitude)
    if magnitude.size != pair.shape[0]:
        raise module.malformed(f"expected {pair.shape[0]} magnitudes, found {magnitude.size}")
    return Dora(
        name=module.path,
        shape=(pair.shape[0], pair.shape[1]),
        sources=module.sources,
        pair=pair,
        magnitude=magnitude.ravel(),
    )


def dora_of_embedding(module: Module, pair: LoraPair, magnitude: np.ndarray) -> DoraOfColumns:
    """Return the update of an embedding, whose lengths run over the vocabulary: one a column."""
    n_rows, n_cols = pair.shape[0], pair.shape[1]
    if magnitude.size != n_cols:
        raise module.malformed(f"expected {n_cols} magnitudes, found {magnitude.size}")
    return DoraOfColumns(
        name=module.path, shape=(n_rows, n_cols), sources=module.sources, pair=pair, magnitude=magnitude.ravel()
    )


def added_bias(module: Module, values: np.ndarray, n: int) -> Added:
    if values.size != n:
        raise module.malformed(f"expected a bias of {n}, found {values.size}")
    return Added(
        name=module.path, shape=(1, n), sources=(module.names["lora_B.bias"],), part="bias", values=values.reshape(1, n)
    )


def adalora(module: Module) -> Found:
    """Return the update of AdaLoRA: B @ (A * E), by the number of ranks that are left."""
    b, a = module.product("lora_B", "lora_A")
    (e,) = module.matrices("lora_E")
    ranknum = module.factors.get(
        "ranknum", np.array(float(number(module.config, "init_r")) if "init_r" in module.config else 0.0)
    )
    if e.shape != (len(a), 1) or ranknum.size != 1 or ranknum <= 0:
        raise module.malformed(f"expected lora_E of {(len(a), 1)}, found {e.shape}, and a ranknum or init_r")
    alpha = number(module.config, "lora_alpha")
    scale = (alpha if alpha > 0 else len(a)) / (float(ranknum.item()) + 1e-5)
    return [LoraPair(module.path, a * e, b, scale, module.sources)]


def vera(module: Module) -> Found:
    """Return the update of VeRA: shared random A and B, of which each module uses the first columns and rows, times its
    own two vectors.
    """
    if not {"vera_A", "vera_B"} <= module.shared.keys():
        raise UnsupportedError("vera_A and vera_B are not in the file: save the adapter with save_projection=True")
    a, b = module.shared["vera_A"], module.shared["vera_B"]
    d, out = (module.factors.get(name, np.zeros(0)).ravel() for name in ("vera_lambda_d", "vera_lambda_b"))
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == len(d) or not 0 < len(out) <= len(b):
        raise module.malformed(
            f"vera_A {a.shape}, vera_B {b.shape} and vectors of {len(d)} and {len(out)} do not multiply"
        )
    return [LoraPair(module.path, a * d[:, None], b[: len(out)] * out[:, None], 1.0, module.sources, wide=True)]


def loha(module: Module) -> Found:
    """Return the update of LoHa: the entrywise product of two low-rank matrices."""
    module.refuse_convolution("LoHa")
    pairs = module.product("hada_w1_a", "hada_w1_b"), module.product("hada_w2_a", "hada_w2_b")
    shape = (len(pairs[0][0]), pairs[0][1].shape[1])
    if shape != (len(pairs[1][0]), pairs[1][1].shape[1]):
        raise module.malformed("its two matrices differ in shape")
    scale = scale_of(module.path, len(pairs[0][1]), module.config, "alpha")
    place: dict[str, Any] = dict(rows=np.arange(shape[0]), cols=np.arange(shape[1]))
    return [Hadamard(name=module.path, shape=shape, sources=module.sources, scale=scale, pairs=pairs, **place)]


def lokr(module: Module) -> Found:
    """Return the update of LoKr: the Kronecker product of two matrices, each whole or a product."""
    module.refuse_convolution("LoKr")
    left, right = (
        module.matrices(whole)[0] if whole in module.factors else np.matmul(*module.product(f"{whole}_a", f"{whole}_b"))
        for whole in ("lokr_w1", "lokr_w2")
    )
    shape = (len(left) * len(right), left.shape[1] * right.shape[1])
    config = module.config
    rank = pattern_value(config.get("rank_pattern"), module.path, number(config, "r"))
    if not rank:
        raise module.malformed("expected a rank r, found 0")
    scale = pattern_value(config.get("alpha_pattern"), module.path, number(config, "alpha")) / rank
    place: dict[str, Any] = dict(rows=np.arange(shape[0]), cols=np.arange(shape[1]))
    return [
        Kronecker(name=module.path, shape=shape, sources=module.sources, scale=scale, left=left, right=right, **place)
    ]


def ia3(module: Module) -> Found:
    """Return what IA³ makes: a factor a column (feed-forward modules) or a row, which the bias gets too."""
    (factors,) = module.matrices("ia3_l")
    if 1 not in factors.shape:
        raise module.malformed(f"expected a vector ia3_l, found {factors.shape}")
    n, values = factors.size, factors.ravel()
    place: dict[str, Any] = dict(name=module.path, sources=module.sources)
    if len(factors) == 1 and n > 1:
        return [Scaled(shape=(0, n), col_factors=values, **place)]
    bias = Scaled(shape=(1, n), col_factors=values, part="bias", optional=True, **place)
    return [Scaled(shape=(n, 0), row_factors=values, **place), bias]


def oft(module: Module) -> Found:
    """Return what OFT makes: block-diagonal rotations of the input, from the upper triangles of skew-symmetric
    matrices.
    """
    name = "oft_embedding_R" if "oft_embedding_R" in module.factors else "oft_R"
    (triangles,) = module.matrices(name)
    size = round((1 + math.sqrt(1 + 8 * triangles.shape[1])) / 2)
    if size * (size - 1) // 2 != triangles.shape[1]:
        raise module.malformed(f"expected rows of size * (size - 1) / 2, found {triangles.shape[1]}")
    config = module.config
    eps = config.get("eps", 6e-5) if config.get("coft") else None
    n_terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None
    parts = triangles, size, eps, n_terms, name == "oft_embedding_R"
    blocks = made(oft_blocks, parts, (len(triangles), size, size))
    n_cols = 0 if config.get("block_share") else len(blocks) * size
    return [Rotated(name=module.path, shape=(0, n_cols), sources=module.sources, stages=[(None, blocks)])]


def boft(module: Module) -> Found:
    """Return what BOFT makes: several block-diagonal rotations, each of the input in another order (a butterfly), then
    a factor a row.
    """
    r, s = module.factors.get("boft_R"), module.factors.get("boft_s")
    if r is None or s is None or r.ndim != 4 or r.shape[2] != r.shape[3] or 0 in r.shape:
        raise module.malformed("expected boft_R with four axes and boft_s")
    n_stages, n_blocks, size, _ = r.shape
    turns = made(boft_blocks, (r,), r.shape, row_wise=True)
    stages = [(butterfly(n_blocks * size, n_blocks >> i, size // 2, n_stages - 1), turns[i]) for i in range(n_stages)]
    shape = (s.size, n_blocks * size)
    return [Rotated(name=module.path, shape=shape, sources=module.sources, stages=stages, row_factors=s.ravel())]


def ln_tuning(module: Module) -> Found:
    raise module.malformed("expected whole norms, found adapter factors")


def trainable_tokens(module: Module) -> Found:
    """Return single rows of an embedding or head, trained whole; which ones the configuration says."""
    (values,) = module.matrices("trainable_tokens_delta")
    only = token_indices(module.path, module.config)
    if only is None or len(only) != len(values):
        raise module.malformed(f"expected the indices of {len(values)} tokens in adapter_config.json")
    place: dict[str, Any] = dict(name=module.path, sources=module.sources)
    return [Replaced(shape=(0, values.shape[1]), values=values, only=np.array(only), **place)]


def token_indices(path: str, config: dict) -> list[int] | None:
    found = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(found, dict):
        return next((indices for name, indices in found.items() if path == name or path.endswith(f".{name}")), None)
    return found


def mlx(module: Module) -> Found:
    """Return the updates of mlx-lm's LoRA and DoRA: factors transposed, embeddings the other way round, experts
    stacked; a scale of its own. Its magnitudes are one a row, of an embedding too."""
    a, b = (module.factors.get(name) for name in ("lora_a", "lora_b"))
    if a is None or b is None or a.ndim != b.ndim or a.ndim not in (2, 3):
        raise module.malformed(
            f"expected lora_a and lora_b, both matrices or both stacked, found {', '.join(module.factors)}"
        )
    if a.ndim == 2 and a.shape[1] == b.shape[0]:
        a, b = (b, a) if module.path.endswith("embed_tokens") else (a.T, b.T)
    if a.shape[-2] != b.shape[-1] or 0 in a.shape or 0 in b.shape:
        raise module.malformed(f"lora_a {a.shape} and lora_b {b.shape} do not multiply")
    scale = mlx_scale(module.config, a.shape[-2])
    path = module.path.replace(".switch_mlp.", ".experts.")
    pair = LoraPair(path, contiguous(a), contiguous(b), scale, module.sources)
    magnitude = module.factors.get("m")
    return [pair if magnitude is None else dora(module, pair, magnitude, embedding=False)]


def mlx_vlm(module: Module) -> Found:
    """Return the updates of mlx-vlm's LoRA: A (in, r) and B (r, out), times alpha."""
    a, b = module.matrices("A", "B")
    if a.shape[1] != len(b):
        raise module.malformed(f"A {a.shape} and B {b.shape} do not multiply")
    a, b = contiguous(a.T), contiguous(b.T)
    return [LoraPair(module.path, a, b, float(number(module.config, "alpha")), module.sources)]


def mlx_scale(config: dict, rank: int) -> float:
    """Return ``scale`` of mlx-lm's configuration; its versions until 2024 multiplied it by alpha / rank."""
    parameters = config.get("lora_parameters", {})
    scale, alpha = parameters.get("scale"), parameters.get("alpha")
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise MalformedError("adapter_config.json: lora_parameters.scale: expected a finite number: correct the file")
    if alpha is None:
        return float(scale)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise MalformedError("adapter_config.json: lora_parameters.alpha: expected a finite number: correct the file")
    return scale * alpha / rank


# peft_type -> its function, and the names of its factors
KINDS: dict[str, tuple[Callable[[Module], Found], tuple[str, ...]]] = {
    "LORA": (lora, ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")),
    "ADALORA": (adalora, ("lora_A", "lora_B", "lora_E", "ranknum")),
    "VERA": (vera, ("vera_lambda_b", "vera_lambda_d")),
    "LOHA": (loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "LOKR": (lokr, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "IA3": (ia3, ("ia3_l",)),
    "OFT": (oft, ("oft_R", "oft_embedding_R")),
    "BOFT": (boft, ("boft_R", "boft_s")),
    "LN_TUNING": (ln_tuning, ()),
    "MLX": (mlx, ("lora_a", "lora_b", "m")),
    "MLX_VLM": (mlx_vlm, ("A", "B")),
    "TRAINABLE_TOKENS": (trainable_tokens, ("trainable_tokens_delta",)),
}
SHARED = ("vera_A", "vera_B")
