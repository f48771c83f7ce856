"""``extract`` and ``factoring``: the adapter that was merged comes back out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from libgguf import quantize_rows

from lora_gguf.adapters.factoring import factor, factor_to
from lora_gguf.adapters.lora import decode, read_adapter_gguf
from lora_gguf.api import extract
from lora_gguf.errors import LoraGgufError, MismatchError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec
from lora_gguf.mapping.hparams import from_config
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.test_convert import TOLERANCE, assert_top


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("extract")


def files(folder, name):
    """A base, and PEFT's merged model as a GGUF."""
    model = from_config(tiny.config_of(name))
    base, merged = tiny.tensors_of(name, model), tiny.tensors_of(name, model, "merged")
    return (
        tiny.base_gguf(folder, name),
        tiny.write_gguf(folder / f"{name}-tuned.gguf", name, base | merged),
        base,
        merged,
    )


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gpt-oss"])
def test_the_adapter_comes_back_and_runs(folder, name):
    base, tuned, before, merged = files(folder, name)
    out = folder / f"{name}-adapter.gguf"
    found = extract(base, tuned, out, 8, outtype="f32")
    assert {tensor.name for tensor in found.tensors} == merged.keys() and not found.left_out
    assert min(tensor.kept for tensor in found.tensors) > 0.999999
    assert found.n_same == len(before) - len(merged)
    for pair in read_adapter_gguf(out)[0]:
        np.testing.assert_allclose(pair.delta(), merged[pair.name] - before[pair.name], atol=1e-5)
    assert_top(tiny.generate(base, out), tiny.expected(name)["merged"]["top"], TOLERANCE.get(name, 1e-3))


def test_a_rank_too_low_says_how_much_it_kept(folder):
    base, tuned, before, merged = files(folder, "llama")
    found = extract(base, tuned, folder / "low.gguf", 2, outtype="f32", force=True)
    for tensor, pair in zip(found.tensors, read_adapter_gguf(folder / "low.gguf")[0], strict=True):
        wanted = merged[pair.name] - before[pair.name]
        kept = 1 - np.square(wanted - pair.delta()).sum() / np.square(wanted).sum()
        assert 0 < tensor.kept < 0.99 and abs(kept - tensor.kept) < 1e-5
        assert abs(tensor.relative_size - np.linalg.norm(wanted) / np.linalg.norm(before[pair.name])) < 1e-5
    assert json.loads(json.dumps(found.as_dict()))["rank"] == 2


def test_what_has_no_place_in_an_adapter_is_named(folder):
    base, _, before, _ = files(folder, "gemma2")
    changed = {
        name: array + 0.1
        for name, array in before.items()
        if name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight")
    }
    tuned = tiny.write_gguf(folder / "gemma-tuned.gguf", "gemma2", before | changed)
    found = extract(base, tuned, folder / "gemma.gguf", 4)
    assert [tensor.name for tensor in found.tensors] == ["blk.0.attn_q.weight"]
    assert (
        set(found.left_out) == {"token_embd.weight", "blk.0.attn_norm.weight"}
        and "tied" in found.left_out["token_embd.weight"]
    )


@pytest.mark.parametrize(("type_name", "noisy"), [("Q8_0", False), ("Q4_0", True)])
def test_quantized_models(tmp_path, type_name, noisy):
    """Retained energy is that of the difference of what the files hold; where it is mostly rounding, that is said."""
    model = from_config(tiny.config_of("llama"))
    base, changes = tiny.tensors_of("llama", model), tiny.tensors_of("llama", model, "merged")
    merged = base | {name: base[name] + 0.1 * (changes[name] - base[name]) for name in changes}
    found = [quantized(tmp_path / f"{i}.gguf", weights, type_name) for i, weights in enumerate((base, merged))]
    report = extract(*found, tmp_path / "a.gguf", 4, outtype="f32")
    with GgufReader(found[0]) as before, GgufReader(found[1]) as after:
        for tensor in report.tensors:
            old, new = (decode(file, file.tensors[tensor.name]).astype(np.float64) for file in (before, after))
            sizes = np.square(np.linalg.svd(new - old, compute_uv=False))
            assert abs(tensor.kept - sizes[:4].sum() / sizes.sum()) < 1e-6
            assert abs(tensor.relative_size - np.linalg.norm(new - old) / np.linalg.norm(old)) < 1e-6
    assert bool(report.warnings) == noisy and all("rounding" in line and "F16" in line for line in report.warnings)


def quantized(path, weights, type_name):
    """The model with the matrices of whole blocks in a type."""
    fits = {name for name, array in weights.items() if array.ndim == 2 and array.shape[1] % 32 == 0}
    specs = [
        TensorSpec(name, BY_NAME[type_name if name in fits else "F32"], array.shape) for name, array in weights.items()
    ]
    with GgufWriter(path, tiny.key_values("llama", from_config(tiny.config_of("llama"))), specs) as writer:
        for name, array in weights.items():
            raw = np.frombuffer(bytes(quantize_rows(array, BY_NAME[type_name].id)), np.uint8) if name in fits else array
            writer.write(writer.tensors[name], 0, np.ascontiguousarray(raw))
        writer.commit()
    return path


def test_refusals(folder):
    base, tuned, before, _ = files(folder, "llama")
    out = folder / "refused.gguf"
    with pytest.raises(MismatchError, match="nothing differs"):
        extract(base, base, out)
    with pytest.raises(MismatchError, match="gpt2"):
        extract(base, tiny.base_gguf(folder, "gpt2"), out)
    for rank in (0, "all"):
        with pytest.raises(UsageError, match="rank"):
            extract(base, tuned, out, rank)
    smaller = tiny.write_gguf(
        folder / "smaller.gguf", "llama", before | {"output.weight": before["output.weight"][:-1]}
    )
    with pytest.raises(MismatchError, match="output.weight"):
        extract(base, smaller, out)
    with pytest.raises(LoraGgufError, match="input"):
        extract(base, tuned, tuned, force=True)
    assert not out.exists()


@pytest.mark.parametrize("shape", [(40, 300), (900, 700), (700, 900)])
def test_factors_keep_what_the_best_ones_would(shape):
    rng = np.random.default_rng(5)
    matrix = (
        rng.standard_normal((shape[0], 10)) @ rng.standard_normal((10, shape[1])) + 0.1 * rng.standard_normal(shape)
    ).astype(np.float32)
    found = factor(matrix, 12)
    best = (
        np.square(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:12]).sum()
        / np.square(matrix.astype(np.float64)).sum()
    )
    left = np.square(matrix - found.b.astype(np.float64) @ found.a).sum() / np.square(matrix.astype(np.float64)).sum()
    assert found.a.shape == (12, shape[1]) and found.b.shape == (shape[0], 12)
    assert abs(found.share - best) < 1e-4 and abs(1 - left - found.share) < 1e-4


def test_factors_of_nothing():
    found = factor(np.zeros((5, 4), np.float32), 8)
    assert found.a.shape == (4, 4) and found.share == 1.0 and found.error == 0.0


def test_the_rank_that_keeps_enough():
    """A matrix of rank 20 and a little noise, and one of noise alone: the least rank whose factors keep 99%."""
    rng = np.random.default_rng(6)
    noise = rng.standard_normal((300, 200)).astype(np.float32)
    clean = (rng.standard_normal((300, 20)) @ rng.standard_normal((20, 200))).astype(np.float32)
    for matrix, most in ((clean + 0.01 * noise, 256), (noise, 256), (noise, 32)):
        found = factor_to(matrix, 0.99, most)
        sizes2 = np.square(np.linalg.svd(matrix.astype(np.float64), compute_uv=False))
        least = min(int(np.searchsorted(np.cumsum(sizes2), 0.99 * sizes2.sum())) + 1, most)
        assert (
            abs(len(found.a) - least) <= 1
            and abs(found.kept / found.energy - sizes2[:least].sum() / sizes2.sum()) < 0.005 * found.share
        )
        left = np.square(matrix - found.b.astype(np.float64) @ found.a).sum() / sizes2.sum()
        assert abs(1 - left - found.share) < 1e-4


def test_rank_auto_is_that_of_the_adapter(folder):
    base, tuned, _, merged = files(folder, "llama")
    found = extract(base, tuned, folder / "auto.gguf", "auto", outtype="f32", threads=2)
    assert len(found.tensors) == len(merged) and min(tensor.kept for tensor in found.tensors) >= 0.99
    assert max(pair.rank for pair in read_adapter_gguf(folder / "auto.gguf")[0]) <= 8


def test_the_threads_do_not_change_it(folder):
    base, tuned, _, _ = files(folder, "llama")
    found = set()
    for threads in (1, 3):
        extract(base, tuned, folder / "same.gguf", 4, threads=threads, force=True)
        found.add((folder / "same.gguf").read_bytes())
    assert len(found) == 1
