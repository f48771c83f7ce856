"""Numbers that no model may hold: refused with tensor and place, wherever they stand; and odd ones that are merged
right.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.errors import MalformedError, NumericError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.output import SUFFIX
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.common import pack_gguf, pack_kv, text_kv, u32_kv, valid_rows

NAME = "blk.0.ffn_up.weight"
SCALED = sorted(name for name, codec in CODECS.items() if codec.scales_at)
MODULE = "base_model.model.model.layers.0.mlp.up_proj"
ROWS, COLS = 4, 512
NAN, INF, NEGATIVE = float("nan"), float("inf"), float("-inf")
HEAD = (
    text_kv("general.architecture", "llama"),
    u32_kv("llama.block_count", 1),
    u32_kv("llama.attention.head_count", 2),
)
pytestmark = pytest.mark.campaign("number cases")


def encoded(weights: np.ndarray, type_name: str) -> np.ndarray:
    quant = CODECS[type_name]
    out = np.empty((len(weights), quant.type.row_bytes(weights.shape[1])), np.uint8)
    importance = np.ones(weights.shape[1], np.float32) if quant.needs_importance else np.empty(0, np.float32)
    quant.encode(np.ascontiguousarray(weights, np.float32), importance, out)
    return out


def decoded(raw: np.ndarray, type_name: str, cols: int = COLS) -> np.ndarray:
    out = np.empty((len(raw), cols), np.float32)
    CODECS[type_name].decode(np.ascontiguousarray(raw), out)
    return out


def base(folder, raw: np.ndarray, type_name: str):
    path = folder / "base.gguf"
    path.write_bytes(pack_gguf(HEAD, [(NAME, type_name, (ROWS, COLS), raw.tobytes())]))
    return path


def plain(type_name: str = "Q8_0") -> np.ndarray:
    return encoded(np.random.default_rng(1).normal(size=(ROWS, COLS)) * 0.02, type_name)


def adapter(folder, a=None, b=None, **fields):
    """A PEFT adapter of rank 1 on the one tensor."""
    found = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"], **fields}
    (folder / "peft").mkdir(exist_ok=True)
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(found))
    weights = {
        "lora_A.weight": np.full((1, COLS), 1e-3) if a is None else a,
        "lora_B.weight": np.ones((ROWS, 1)) if b is None else b,
    }
    save(folder, weights)
    return folder / "peft"


def save(folder, weights) -> None:
    tensors = {f"{MODULE}.{key}": np.ascontiguousarray(value, np.float32) for key, value in weights.items()}
    safetensors.numpy.save_file(tensors, folder / "peft" / "adapter_model.safetensors")


def refused(folder, base_path, adapters, *parts: str, error=NumericError, policy: Policy = Policy()) -> None:
    """The merge is refused in a line that names all ``parts``, and nothing is left."""
    (folder / "out.gguf").write_bytes(b"old")
    with pytest.raises(error) as caught:
        merge(base_path, adapters, folder / "out.gguf", policy, force=True)
    text = " ".join([str(caught.value), *caught.value.details])
    assert all(part in text for part in parts) and text.isprintable(), text
    assert (folder / "out.gguf").read_bytes() == b"old" and not [p for p in folder.iterdir() if p.name.endswith(SUFFIX)]


def merged(folder, base_path, adapters, policy: Policy = Policy()) -> np.ndarray:
    """The merged tensor as stored, once ggml has judged it."""
    merge(base_path, adapters, folder / "out.gguf", policy, force=True)
    with GgufReader(folder / "out.gguf") as reader:
        info = reader.tensors[NAME]
        raw = reader.read(info)
    assert valid_rows(info.type.name, raw)
    return raw


def spoiled(value, shape, place) -> np.ndarray:
    array = np.full(shape, 1e-3, np.float32)
    array[place] = value
    return array


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
@pytest.mark.parametrize("part", ["A", "B"])
def test_factors_of_a_peft_adapter(tmp_path, part, value):
    bad = {"a": spoiled(value, (1, COLS), (0, 77))} if part == "A" else {"b": spoiled(value, (ROWS, 1), (2, 0))}
    refused(
        tmp_path,
        base(tmp_path, plain(), "Q8_0"),
        [(adapter(tmp_path, **bad), 1.0)],
        f"lora_{part}",
        "77" if part == "A" else "2",
    )


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
@pytest.mark.parametrize("part", ["a", "b"])
def test_factors_of_an_adapter_gguf(tmp_path, part, value):
    pair = LoraPair(NAME, np.full((1, COLS), 1e-3, np.float32), np.ones((ROWS, 1), np.float32), 1.0)
    write_adapter_gguf(tmp_path / "adapter.gguf", [pair], "llama")
    raw = bytearray((tmp_path / "adapter.gguf").read_bytes())
    with GgufReader(tmp_path / "adapter.gguf") as reader:
        at = reader.data_position + reader.tensors[f"{NAME}.lora_{part}"].offset + 4
    raw[at : at + 4] = np.float32(value).tobytes()
    (tmp_path / "adapter.gguf").write_bytes(raw)
    refused(tmp_path, base(tmp_path, plain(), "Q8_0"), [(tmp_path / "adapter.gguf", 1.0)], f"{NAME}.lora_{part}", "1")


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
def test_alpha_of_an_adapter_gguf(tmp_path, value):
    infos = [
        (f"{NAME}.lora_a", "F32", (1, COLS), bytes(4 * COLS)),
        (f"{NAME}.lora_b", "F32", (ROWS, 1), bytes(4 * ROWS)),
    ]
    keys = [HEAD[0], text_kv("general.type", "adapter"), text_kv("adapter.type", "lora")]
    keys.append(pack_kv("adapter.lora.alpha", 6, np.float32(value).tobytes()))
    (tmp_path / "adapter.gguf").write_bytes(pack_gguf(keys, infos))
    refused(tmp_path, base(tmp_path, plain(), "Q8_0"), [(tmp_path / "adapter.gguf", 1.0)], "adapter.lora.alpha")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_alpha_of_a_peft_adapter(tmp_path, text):
    path = adapter(tmp_path) / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 1', f'"lora_alpha": {text}'))
    refused(
        tmp_path,
        base(tmp_path, plain(), "Q8_0"),
        [(tmp_path / "peft", 1.0)],
        "adapter_config.json",
        error=MalformedError,
    )


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE, 1e39])
def test_scales(tmp_path, value):
    refused(tmp_path, base(tmp_path, plain(), "Q8_0"), [(adapter(tmp_path), value)], "scale", error=UsageError)


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
def test_magnitudes_of_dora(tmp_path, value):
    path = adapter(tmp_path, use_dora=True)
    weights = {"lora_A.weight": np.full((1, COLS), 1e-3), "lora_B.weight": np.ones((ROWS, 1))}
    save(tmp_path, {**weights, "lora_magnitude_vector": spoiled(value, (ROWS,), 3)})
    refused(tmp_path, base(tmp_path, plain(), "Q8_0"), [(path, 1.0)], "lora_magnitude_vector", "3")


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_weights_of_a_base_of_floats(tmp_path, type_name, value):
    weights = np.full((ROWS, COLS), 0.5, np.float32)
    raw = encoded(weights, type_name).reshape(ROWS, -1)
    width = raw.shape[1] // COLS
    raw[2, 9 * width : 10 * width] = encoded(np.full((1, COLS), value), type_name).reshape(-1)[:width]
    refused(tmp_path, base(tmp_path, raw, type_name), [(adapter(tmp_path), 1.0)], NAME, "row")


@pytest.mark.parametrize("value", [NAN, INF, NEGATIVE])
@pytest.mark.parametrize("type_name", SCALED)
def test_scales_of_a_base_of_blocks(tmp_path, type_name, value):
    for field in CODECS[type_name].scales_at:
        raw = plain(type_name)
        raw[1, field : field + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        assert not valid_rows(type_name, raw)
        for rounding in ("auto", "fresh"):
            refused(
                tmp_path,
                base(tmp_path, raw, type_name),
                [(adapter(tmp_path), 1.0)],
                NAME,
                "row 1",
                policy=Policy(rounding),
            )


@pytest.mark.parametrize("rounding", ["auto", "dither", "fresh"])
def test_a_shared_exponent_that_is_none(tmp_path, rounding):
    raw = plain("MXFP4")
    raw[1, 0] = 0xFF
    assert not valid_rows("MXFP4", raw)
    refused(tmp_path, base(tmp_path, raw, "MXFP4"), [(adapter(tmp_path), 1.0)], NAME, "row", policy=Policy(rounding))


# type -> an update that its floats, or its f16 scales, cannot hold
TOO_LARGE = {
    "F16": 1e5, "Q8_0": 1e7, "Q4_0": 1e6, "Q4_1": 1e7, "Q5_0": 2e6, "Q5_1": 1e7, "IQ4_NL": 1e8, "TQ2_0": 1e5, "TQ1_0": 1e5,
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), 1e12),
}  # fmt: skip


@pytest.mark.parametrize("rounding", ["auto", "dither", "nearest", "fresh"])
@pytest.mark.parametrize("type_name", TOO_LARGE)
def test_what_a_type_cannot_hold(tmp_path, type_name, rounding):
    """Refused, with a type that can; or, where the grid stays, written as what it can hold and told in the report."""
    sizes = np.ones((ROWS, 1)) * TOO_LARGE[type_name]
    path, lora = base(tmp_path, plain(type_name), type_name), [(adapter(tmp_path, np.ones((1, COLS)), sizes), 1.0)]
    try:
        report = merge(path, lora, tmp_path / "out.gguf", Policy(rounding))
    except NumericError:
        refused(tmp_path, path, lora, NAME, "--type", policy=Policy(rounding))
    else:
        assert rounding in ("dither", "nearest") or CODECS[type_name].grid.levels is not None
        assert report.whole.kept < 0.5 and report.plan.warnings
        with GgufReader(tmp_path / "out.gguf") as reader:
            assert valid_rows(type_name, reader.read(reader.tensors[NAME]))


@pytest.mark.parametrize("type_name", sorted({*SCALED, "F16", "BF16", "F32", "MXFP4", "NVFP4"}))
def test_odd_weights_and_odd_updates(tmp_path, type_name):
    """Blocks of zeros, of signed zeros, of denormals, of one value, of one large weight: written as ggml would load
    them.
    """
    weights = np.zeros((ROWS, COLS), np.float32)
    weights[1] = np.tile([0.0, -0.0], COLS // 2)
    weights[2, :256], weights[2, 256:] = 1e-40, np.linspace(-6e-8, 6e-8, 256)
    weights[3, :256], weights[3, 300] = -0.75, 1000.0
    raw = encoded(weights, type_name)
    for size in (0.0, -0.0, 1e-45, 1e-30, 1e-6, 1.0):
        for rounding in ("auto", "dither", "nearest"):
            lora = adapter(tmp_path, b=np.full((ROWS, 1), size))
            try:
                after = merged(tmp_path, base(tmp_path, raw, type_name), [(lora, 1.0)], Policy(rounding))
            except NumericError as error:  # another type's noise is larger than this update
                assert "kept -" in str(error) and type_name.startswith("IQ") and size
                continue
            found = decoded(after, type_name) if len(after[0]) == len(raw[0]) else None
            if found is not None and size == 0:
                assert (after == raw).all()
            if found is not None:
                assert np.isfinite(found).all()


def test_what_the_update_cancels(tmp_path):
    weights = np.full((ROWS, COLS), 0.25, np.float32)
    for type_name in ("F32", "F16", "BF16"):
        raw = encoded(weights, type_name)
        after = merged(tmp_path, base(tmp_path, raw, type_name), [(adapter(tmp_path, np.full((1, COLS), -0.25)), 1.0)])
        assert (decoded(after, type_name) == 0).all()


def test_largest_scales_do_not_become_infinite(tmp_path):
    """``auto`` moves f16 scales; at the largest f16 there is no next one."""
    for type_name in ("Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"):
        raw = plain(type_name).reshape(-1, BY_NAME[type_name].block_bytes)
        for field in CODECS[type_name].scales_at:
            raw[:, field : field + 2] = np.frombuffer(np.float16(65504).tobytes(), np.uint8)
        path = base(tmp_path, raw, type_name)
        for size in (1e3, 1e5, -1e5):
            lora = [(adapter(tmp_path, np.ones((1, COLS)), np.full((ROWS, 1), size)), 1.0)]
            try:
                merged(tmp_path, path, lora)
            except NumericError as error:
                assert NAME in str(error) or "kept -" in str(error)
