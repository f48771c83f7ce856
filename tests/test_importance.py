"""Which columns matter: planted in a small model, and found in a real one by another statistic."""

import numpy as np
import pytest
from libgguf import dequantize_rows

from lora_gguf.files.base import Base
from lora_gguf.merging.importance import importance_of
from tests.common import pack_gguf, smollm2_path, text_kv

WIDTH, HIDDEN, HEAVY, SUPER = 512, 128, 5, 17


def planted(n_experts: int = 0) -> bytes:
    """Two layers whose residual stream is heavy in column HEAVY, made by column SUPER of the first layer's ffn_down."""
    rng = np.random.default_rng(0)
    tensors = []
    for layer in (0, 1):
        v, up = rng.normal(size=(32, WIDTH)), rng.normal(size=(HIDDEN, WIDTH))
        v[:, HEAVY] *= 0.05
        up[:, HEAVY] *= 0.05
        down = rng.normal(size=(n_experts or 1, WIDTH, HIDDEN))
        if layer == 0:
            down[:, HEAVY, SUPER] = 40
        suffix = "_exps" if n_experts else ""
        down = down if n_experts else down[0]
        for name, array in (("attn_v", v), ("ffn_up", up), (f"ffn_down{suffix}", down)):
            tensors.append((f"blk.{layer}.{name}.weight", "F32", array.shape, array.astype("<f4").tobytes()))
    return pack_gguf([text_kv("general.architecture", "llama")], tensors)


def importances(base, names):
    energies = {}
    return {name: importance_of(base, name, None, energies) for name in names}


@pytest.mark.parametrize("n_experts", [0, 3])
def test_planted_columns_are_found(tmp_path, n_experts):
    path, down = tmp_path / "base.gguf", f"blk.0.ffn_down{'_exps' if n_experts else ''}.weight"
    path.write_bytes(planted(n_experts))
    with Base(path) as base:
        found = importances(base, base.tensors)
    for name, weights in found.items():
        assert weights.shape == (n_experts if "exps" in name else 1, base.tensors[name].n_cols)
        assert np.isfinite(weights).all() and np.allclose(weights.mean(axis=1), 1, rtol=1e-4)
    assert found["blk.0.ffn_up.weight"][0].argmax() == HEAVY
    assert (found[down].argmax(axis=1) == SUPER).all() and found[down].max(axis=1).min() > 20
    other = found[down.replace("blk.0", "blk.1")]
    assert other.max() < 20


def test_super_weights_of_a_real_model():
    """The column of ffn_down with the largest kurtosis over all its rows is one of the first seven of 1536, in most
    layers.
    """
    with Base(smollm2_path()) as base:
        names = [f"blk.{layer}.ffn_down.weight" for layer in range(30)]
        found, ranks = importances(base, names), []
        for name in names:
            info = base.tensors[name]
            weights = dequantize_rows(base.reader_of(name).read(info), info.type.id, n_per_row=info.n_cols)
            weights = weights.reshape(info.shape).astype(np.float64)
            kurtosis = (weights**4).mean(0) / (weights**2).mean(0) ** 2
            ranks.append((found[name][0] > found[name][0][kurtosis.argmax()]).sum())
    assert (np.array(ranks) < 7).sum() >= 26
