"""``kinds``: what no fixture shows: MLX adapters, sharded and named ones, and malformed factors of each kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.rotations import butterfly, cayley, neumann
from lora_gguf.errors import MalformedError, NumericError, UnsupportedError
from tests import tiny
from tests.common import FIXTURES

KINDS = FIXTURES / "kinds"
PATH = "base_model.model.model.layers.0.self_attn.q_proj"


def write(folder, tensors, **config):
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mlx(folder, tensors, **parameters):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    )
    return read_adapter(folder).updates


def test_mlx_factors_are_transposed_and_have_a_scale_of_their_own(tmp_path):
    a, b = random(6, 4), random(4, 10, seed=1)
    (pair,) = mlx(
        tmp_path,
        {"model.layers.0.self_attn.q_proj.lora_a": a, "model.layers.0.self_attn.q_proj.lora_b": b},
        rank=4,
        scale=20.0,
    )
    assert pair.name == "model.layers.0.self_attn.q_proj"
    np.testing.assert_allclose(pair.delta(), 20 * (a @ b).T, rtol=1e-5)


def test_mlx_of_2024_multiplied_by_alpha_over_rank(tmp_path):
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": random(6, 4),
        "model.layers.0.self_attn.q_proj.lora_b": random(4, 10),
    }
    assert mlx(tmp_path, tensors, rank=4, scale=10.0, alpha=16)[0].scale == 40.0


def test_mlx_embeddings(tmp_path):
    a, b = random(100, 4), random(4, 6, seed=1)
    (pair,) = mlx(tmp_path, {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, rank=4, scale=2.0)
    np.testing.assert_allclose(pair.delta(), 2 * (a @ b), rtol=1e-5)


def test_mlx_experts(tmp_path):
    a, b = random(3, 4, 6), random(3, 10, 4, seed=1)
    path = "model.layers.0.mlp.switch_mlp.gate_proj"
    (pair,) = mlx(tmp_path, {f"{path}.lora_a": a, f"{path}.lora_b": b}, rank=4, scale=2.0)
    assert pair.name == "model.layers.0.mlp.experts.gate_proj" and pair.shape == (3, 10, 6)
    np.testing.assert_allclose(pair.delta(), 2 * (b @ a), rtol=1e-5)


def test_mlx_dora(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_a": random(6, 4), f"{path}.lora_b": random(4, 10), f"{path}.m": random(10)}
    (update,) = mlx(tmp_path, tensors, rank=4, scale=2.0)
    assert update.kind == "DoRA" and update.shape == (10, 6)


@pytest.mark.parametrize("parameters", [{}, {"scale": "20"}, {"scale": 2.0, "alpha": []}, {"scale": True}])
def test_mlx_without_a_scale_is_refused(tmp_path, parameters):
    with pytest.raises(MalformedError, match="lora_parameters"):
        mlx(tmp_path, {"a.lora_a": random(6, 4), "a.lora_b": random(4, 10)}, rank=4, **parameters)


def test_sharded_adapters(tmp_path):
    source = tiny.TINY / "llama" / "adapter"
    tensors = load_file(source / "adapter_model.safetensors")
    names = sorted(tensors)
    shards = {f"adapter_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    found = {update.name: update for update in read_adapter(tmp_path).updates}
    for update in read_adapter(source).updates:
        np.testing.assert_array_equal(found[update.name].delta(), update.delta())


@pytest.mark.parametrize("middle", [".default", ".my-adapter"])
@pytest.mark.parametrize("name", ["dora", "embedding", "vera", "ia3", "oft", "loha"])
def test_names_that_still_hold_the_adapters_own(tmp_path, name, middle):
    tensors = load_file(KINDS / name / "adapter_model.safetensors")

    def named(key):
        stem, dot, suffix = key.rpartition(".")
        return f"{stem}{middle}.{suffix}" if suffix == "weight" else key + middle

    kept = [key for key in tensors if ".base_layer." in key or key.startswith("base_model.vera_")]
    renamed = {key if key in kept else named(key): array for key, array in tensors.items()}
    config = json.loads((KINDS / name / "adapter_config.json").read_text())
    updates = read_adapter(write(tmp_path, renamed, **config)).updates
    assert [update.name for update in updates] == [update.name for update in read_adapter(KINDS / name).updates]


BROKEN = {
    "dora": lambda t: {k: v[:-1] if "magnitude" in k else v for k, v in t.items()},
    "adalora": lambda t: {k: v[:-1] if "lora_E" in k else v for k, v in t.items()},
    "vera": lambda t: {k: v[:-1] if "lambda_d" in k else v for k, v in t.items()},
    "loha": lambda t: {k: v[:, :-1] if "w2_b" in k else v for k, v in t.items()},
    "lokr": lambda t: {k: v for k, v in t.items() if "w2_b" not in k},
    "ia3": lambda t: {k: np.concatenate([v, v], axis=-1) if v.shape[-1] == 1 else v for k, v in t.items()},
    "oft": lambda t: {k: v[:, :-1] for k, v in t.items()},
    "boft": lambda t: {k: v[..., :-1] if "boft_R" in k else v for k, v in t.items()},
    "tokens": lambda t: {k: v[:-1] if "tokens_delta" in k else v for k, v in t.items()},
    "lora-bias": lambda t: {k: v[:-1] if "bias" in k else v for k, v in t.items()},
}


@pytest.mark.parametrize("name", BROKEN)
def test_malformed_factors_of_each_kind(tmp_path, name):
    tensors = BROKEN[name](load_file(KINDS / name / "adapter_model.safetensors"))
    config = json.loads((KINDS / name / "adapter_config.json").read_text())
    with pytest.raises(MalformedError):
        read_adapter(write(tmp_path, tensors, **config))


@pytest.mark.parametrize("name", BROKEN)
def test_nan_in_each_kind(tmp_path, name):
    tensors = load_file(KINDS / name / "adapter_model.safetensors")
    key = sorted(tensors)[-1]
    tensors[key] = tensors[key].copy()
    tensors[key].flat[0] = np.nan
    config = json.loads((KINDS / name / "adapter_config.json").read_text())
    with pytest.raises(NumericError):
        read_adapter(write(tmp_path, tensors, **config))


def test_magnitudes_and_use_dora_must_agree(tmp_path):
    tensors = load_file(KINDS / "dora" / "adapter_model.safetensors")
    config = json.loads((KINDS / "dora" / "adapter_config.json").read_text())
    with pytest.raises(MalformedError, match="use_dora"):
        read_adapter(write(tmp_path, tensors, **(config | {"use_dora": False})))


def test_vera_without_its_projections_says_how_to_save_it(tmp_path):
    tensors = {k: v for k, v in load_file(KINDS / "vera" / "adapter_model.safetensors").items() if "lambda" in k}
    config = json.loads((KINDS / "vera" / "adapter_config.json").read_text())
    with pytest.raises(UnsupportedError, match="save_projection"):
        read_adapter(write(tmp_path, tensors, **config))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_changed_the_base_name_pefts_conversion(tmp_path, init):
    factors = {f"{PATH}.lora_A.weight": random(4, 6), f"{PATH}.lora_B.weight": random(10, 4)}
    with pytest.raises(UnsupportedError, match="path_initial_model_for_weight_conversion"):
        read_adapter(write(tmp_path, factors, r=4, lora_alpha=4, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_inits_do_not_matter(tmp_path, init):
    factors = {f"{PATH}.lora_A.weight": random(4, 6), f"{PATH}.lora_B.weight": random(10, 4)}
    assert read_adapter(write(tmp_path, factors, r=4, lora_alpha=4, init_lora_weights=init)).updates


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "HRA", "FOURIERFT", "POLY", "SOMETHING_NEW"])
def test_unknown_kinds_are_refused_by_name(tmp_path, kind):
    with pytest.raises(UnsupportedError, match=f"{kind}.*convert_to_lora"):
        read_adapter(write(tmp_path, {"x": random(2, 2)}, peft_type=kind))


def test_cayley_is_a_rotation_and_neumann_comes_close():
    skew = random(3, 4, 4) * 0.02
    skew = skew - skew.swapaxes(1, 2)
    turns = cayley(skew)
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.broadcast_to(np.eye(4), turns.shape), atol=1e-12)
    inverse = cayley(-skew)  # PEFT's series has the other sign
    for n_terms, error in ((2, 1e-2), (5, 1e-4), (9, 1e-7)):
        assert np.abs(neumann(skew, n_terms) - inverse).max() < error


@pytest.mark.parametrize("n_stages", [1, 2])
def test_butterfly_orders_are_permutations(n_stages):
    for i in range(n_stages + 1):
        order = butterfly(32, 8 >> i, 2, n_stages)
        assert sorted(order) == list(range(32))
    assert butterfly(32, 8, 2, 0) is None
