"""``placement``: real PEFT adapters on small models of many architectures, against what PEFT's own merge makes of
them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.errors import MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_base, from_config
from tests import tiny
from tests.calls import adapter_gguf_pairs, gguf_pairs
from tests.common import FIXTURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def merged_weights(name):
    """The GGUF tensors of PEFT's merged model that differ from the base's."""
    return tiny.tensors_of(name, from_config(tiny.config_of(name)), "merged")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_merged_weights_are_pefts(name, folder):
    base = tiny.tensors_of(name, from_config(tiny.config_of(name)))
    with GgufReader(tiny.base_gguf(folder, name)) as reader:
        placement = gguf_pairs(
            read_adapter(tiny.TINY / name / "adapter"), from_base(reader, tiny.config_of(name)), updates=True
        )
    wanted = merged_weights(name)
    assert {pair.name for pair in placement.pairs} == wanted.keys() and not placement.updates
    assert all(account.outcome == "applied" for account in placement.accounts)
    for pair in placement.pairs:
        found = base[pair.name] + pair.delta()
        np.testing.assert_allclose(found, wanted[pair.name], rtol=0, atol=2e-6 * np.abs(found).max(), err_msg=pair.name)
        assert np.abs(wanted[pair.name] - base[pair.name]).max() > 0.01


ADAPTERS = [(tiny.TINY / name / "adapter", name) for name in tiny.NAMES]
KINDS = sorted(merged.parent for merged in FIXTURES.glob("kinds/*/merged.safetensors"))
ADAPTERS += [(source, (source / "base").read_text()) for source in KINDS]


@pytest.mark.parametrize(
    ("source", "name"), ADAPTERS, ids=[str(source.relative_to(FIXTURES)) for source, _ in ADAPTERS]
)
def test_every_tensor_of_an_adapter_has_one_account(source, name, folder):
    with GgufReader(tiny.base_gguf(folder, name)) as reader:
        options = dict(config=tiny.config_of(name), updates=True, new_tokens=True, tied="shared")
        accounts = gguf_pairs(read_adapter(source), reader, **options).accounts
    assert sorted(account.tensor for account in accounts) == sorted(load_file(source / "adapter_model.safetensors"))
    assert all(account.target if account.outcome == "applied" else account.reason for account in accounts)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_config_json_gives_the_same_as_the_base(name, folder):
    adapter = read_adapter(tiny.TINY / name / "adapter")
    with GgufReader(tiny.base_gguf(folder, name)) as reader:
        by_base = gguf_pairs(adapter, from_base(reader, tiny.config_of(name)))
    by_config = gguf_pairs(adapter, from_config(tiny.config_of(name)))
    assert [pair.name for pair in by_config.pairs] == [pair.name for pair in by_base.pairs]
    for a, b in zip(by_config.pairs, by_base.pairs, strict=True):
        np.testing.assert_array_equal(a.a, b.a)
        np.testing.assert_array_equal(a.b, b.b)


def placed(name, tensors, folder, adapter=None, **options):
    """name -> pair of the adapter (the fixture's own if not given) on a base that has ``tensors``."""
    base = tiny.write_gguf(folder / "changed.gguf", name, tensors)
    with GgufReader(base) as reader:
        adapter = adapter or read_adapter(tiny.TINY / name / "adapter")
        placement = gguf_pairs(adapter, reader, updates=True, **options)
    assert not placement.updates
    return {pair.name: pair for pair in placement.pairs}


def deltas(name):
    """The update of each GGUF tensor, by PEFT's merge."""
    model = from_config(tiny.config_of(name))
    base = tiny.tensors_of(name, model)
    return {key: array - base[key] for key, array in merged_weights(name).items()}


def assert_delta(pair, wanted):
    np.testing.assert_allclose(pair.delta(), wanted, rtol=0, atol=3e-6 * max(1, np.abs(wanted).max()))


def test_split_adapter_on_a_fused_base(folder):
    tensors, wanted = tiny.tensors_of("llama", from_config(tiny.config_of("llama"))), deltas("llama")
    for layer in range(2):
        parts = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([tensors.pop(part) for part in parts])
    pairs = placed("llama", tensors, folder)
    for layer in range(2):
        fused = pairs[f"blk.{layer}.attn_qkv.weight"]
        assert fused.rank == 12 and len(fused.sources) == 6
        assert_delta(fused, np.concatenate([wanted[f"blk.{layer}.attn_{part}.weight"] for part in "qkv"]))


def test_part_of_a_fused_base(folder):
    tensors, wanted = tiny.tensors_of("llama", from_config(tiny.config_of("llama"))), deltas("llama")
    parts = [f"blk.0.attn_{part}.weight" for part in "qkv"]
    tensors["blk.0.attn_qkv.weight"] = np.concatenate([tensors.pop(part) for part in parts])
    adapter = read_adapter(tiny.TINY / "llama" / "adapter")
    adapter.updates = [update for update in adapter.updates if "k_proj" in update.name]
    pair = placed("llama", tensors, folder, adapter)["blk.0.attn_qkv.weight"]
    assert pair.rank == 4
    assert_delta(pair, np.concatenate([np.zeros((32, 32)), wanted["blk.0.attn_k.weight"], np.zeros((16, 32))]))


def test_fused_adapter_on_a_split_base(folder):
    tensors, wanted = tiny.tensors_of("phi3", from_config(tiny.config_of("phi3"))), deltas("phi3")
    for layer in range(2):
        q, k, v = np.split(tensors.pop(f"blk.{layer}.attn_qkv.weight"), [32, 48])
        tensors |= {f"blk.{layer}.attn_q.weight": q, f"blk.{layer}.attn_k.weight": k, f"blk.{layer}.attn_v.weight": v}
        gate, up = np.split(tensors.pop(f"blk.{layer}.ffn_up.weight"), 2)
        tensors |= {f"blk.{layer}.ffn_gate.weight": gate, f"blk.{layer}.ffn_up.weight": up}
    pairs = placed("phi3", tensors, folder)
    for layer in range(2):
        q, k, v = np.split(wanted[f"blk.{layer}.attn_qkv.weight"], [32, 48])
        gate, up = np.split(wanted[f"blk.{layer}.ffn_up.weight"], 2)
        for part, delta in (("attn_q", q), ("attn_k", k), ("attn_v", v), ("ffn_gate", gate), ("ffn_up", up)):
            assert_delta(pairs[f"blk.{layer}.{part}.weight"], delta)


def test_split_gate_and_up_on_a_fused_base(folder):
    tensors, wanted = tiny.tensors_of("llama", from_config(tiny.config_of("llama"))), deltas("llama")
    for layer in range(2):
        gate, up = f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight"
        tensors[up] = np.concatenate([tensors.pop(gate), tensors[up]])
    pairs = placed("llama", tensors, folder)
    assert_delta(
        pairs["blk.1.ffn_up.weight"], np.concatenate([wanted["blk.1.ffn_gate.weight"], wanted["blk.1.ffn_up.weight"]])
    )


def test_experts_of_a_fused_base(folder):
    tensors, wanted = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe"))), deltas("qwen3moe")
    for layer in range(2):
        parts = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate([tensors.pop(part) for part in parts], axis=1)
    pairs = placed("qwen3moe", tensors, folder)
    delta = np.concatenate([wanted["blk.1.ffn_gate_exps.weight"], wanted["blk.1.ffn_up_exps.weight"]], axis=1)
    assert_delta(pairs["blk.1.ffn_gate_up_exps.weight"], delta)


def test_an_older_base_with_one_latent_tensor(folder):
    tensors, wanted = tiny.tensors_of("deepseek2", from_config(tiny.config_of("deepseek2"))), deltas("deepseek2")

    def whole(found, layer):
        k, v = found[f"blk.{layer}.attn_k_b.weight"].swapaxes(1, 2), found[f"blk.{layer}.attn_v_b.weight"]
        return np.concatenate([k, v], axis=1).reshape(-1, k.shape[-1])

    for layer in range(2):
        tensors[f"blk.{layer}.attn_kv_b.weight"] = whole(tensors, layer)
        del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
    assert_delta(placed("deepseek2", tensors, folder)["blk.0.attn_kv_b.weight"], whole(wanted, 0))


# the experts of qwen3moe in every form in which an adapter may hold them
EXPERTS = ".mlp.experts"


def packed(factors, path, outer):
    """One packed parameter's factors, (E, r, in) and (E, out, r), out of PEFT's tensors."""
    prefix = f"base_model.model.{path}.{'' if outer else 'base_layer.'}lora_"
    a, b = factors[f"{prefix}A.weight"], factors[f"{prefix}B.weight"]
    return a.reshape(4, 4, -1), b.reshape(len(b), 4, 4).transpose(2, 0, 1)


def swapped(factors, config):
    """As PEFT before 0.19.1 saves: in and out of packed parameters exchanged."""
    changed = dict(factors)
    for path in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        for outer in (True, False):
            a, b = packed(factors, path, outer)
            prefix = f"base_model.model.{path}.{'' if outer else 'base_layer.'}lora_"
            changed[f"{prefix}A.weight"] = np.ascontiguousarray(b.transpose(0, 2, 1).reshape(16, -1))
            changed[f"{prefix}B.weight"] = np.ascontiguousarray(a.transpose(2, 1, 0).reshape(a.shape[2], -1))
    return changed, config


def expert_major(factors, config):
    """As Unsloth saved until September 2026, with its marker."""
    changed = dict(factors)
    for name, b in factors.items():
        if EXPERTS in name and "lora_B" in name:
            changed[name] = np.ascontiguousarray(b.reshape(-1, 4, 4).transpose(0, 2, 1).reshape(len(b), -1))
    return changed, config | {"lora_B_layout": "grouped_by_expert"}


def by_module(factors, config):
    """As PEFT on transformers 4 saves: three modules an expert."""
    changed = {name: array for name, array in factors.items() if EXPERTS not in name}
    for path in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        (a, b), (c, d) = packed(factors, path, False), packed(factors, path, True)
        for e in range(4):
            gate, up = np.split(b[e], 2)
            for module, down, out in (("gate_proj", a[e], gate), ("up_proj", a[e], up), ("down_proj", c[e], d[e])):
                changed[f"base_model.model.{path}.{e}.{module}.lora_A.weight"] = np.ascontiguousarray(down)
                changed[f"base_model.model.{path}.{e}.{module}.lora_B.weight"] = np.ascontiguousarray(out)
    return changed, config | {"target_parameters": ["mlp.gate.weight"]}


def rewritten(tmp_path, name, change):
    """The adapter of a tiny model with its tensors and configuration changed."""
    folder = tiny.TINY / name / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    factors, config = change(load_file(folder / "adapter_model.safetensors"), config)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(tmp_path)


@pytest.mark.parametrize("change", [swapped, expert_major, by_module])
def test_every_form_of_experts_gives_the_same(tmp_path, folder, change):
    tensors, wanted = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe"))), deltas("qwen3moe")
    pairs = placed("qwen3moe", tensors, folder, rewritten(tmp_path, "qwen3moe", change))
    assert pairs.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert_delta(pairs[name], delta)


def test_the_layout_of_b_may_be_given_where_the_adapter_does_not_say(tmp_path, folder):
    def unmarked(factors, config):
        changed, _ = expert_major(factors, config)
        return changed, config

    rewritten(tmp_path, "qwen3moe", unmarked)
    tensors, wanted = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe"))), deltas("qwen3moe")
    pairs = placed("qwen3moe", tensors, folder, read_adapter(tmp_path, "expert-major"))
    assert_delta(pairs["blk.0.ffn_up_exps.weight"], wanted["blk.0.ffn_up_exps.weight"])
    pairs = placed("qwen3moe", tensors, folder, read_adapter(tmp_path))
    assert np.abs(pairs["blk.0.ffn_up_exps.weight"].delta() - wanted["blk.0.ffn_up_exps.weight"]).max() > 0.1


def test_square_packed_parameters_go_as_the_others_do(tmp_path, folder):
    """gpt-oss's down_proj is square; with PEFT's other orientation only gate_up_proj can tell."""
    tensors, wanted = tiny.tensors_of("gpt-oss", from_config(tiny.config_of("gpt-oss"))), deltas("gpt-oss")
    pairs = placed("gpt-oss", tensors, folder, rewritten(tmp_path, "gpt-oss", swapped))
    for name, delta in wanted.items():
        assert_delta(pairs[name], delta)


def test_absent_experts_are_zero_and_ranks_may_differ(tmp_path, folder):
    def some(factors, config):
        changed, config = by_module(factors, config)
        changed = {name: array for name, array in changed.items() if ".experts.1." not in name}
        for name in [name for name in changed if ".experts.2.up_proj" in name]:
            changed[name] = changed[name][:2] if "lora_A" in name else np.ascontiguousarray(changed[name][:, :2])
        config["rank_pattern"], config["alpha_pattern"] = {r"experts\.2\.up_proj": 2}, {r"experts\.2\.up_proj": 3}
        return changed, config

    tensors, wanted = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe"))), deltas("qwen3moe")
    pairs = placed("qwen3moe", tensors, folder, rewritten(tmp_path, "qwen3moe", some))
    pair = pairs["blk.0.ffn_up_exps.weight"]
    assert pair.shape == (4, 24, 32) and not pair.delta()[1].any()
    np.testing.assert_allclose(pair.delta()[[0, 3]], wanted["blk.0.ffn_up_exps.weight"][[0, 3]], atol=1e-5)


@pytest.mark.campaign("adapters that do not fit")
def test_an_expert_too_many_is_refused(tmp_path, folder):
    def more(factors, config):
        changed, config = by_module(factors, config)
        return changed | {name.replace(".experts.3.", ".experts.4."): array for name, array in changed.items()}, config

    tensors = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe")))
    with pytest.raises(MismatchError, match="experts 0 to 3"):
        placed("qwen3moe", tensors, folder, rewritten(tmp_path, "qwen3moe", more))


def embedding_adapter(folder, base):
    """The fixture that adapts head and embedding, as if it were made for ``base``."""
    adapter = read_adapter(FIXTURES / "kinds" / "embedding")
    adapter.updates = [update for update in adapter.updates if "layers" not in update.name]
    return adapter


@pytest.mark.parametrize("tied", ["refuse", "separate", "shared"])
def test_a_tied_base(folder, tied):
    tensors = tiny.tensors_of("qwen2", from_config(tiny.config_of("qwen2")))
    del tensors["output.weight"]
    adapter = embedding_adapter(folder, "qwen2")
    head, embedding = (
        {update.name: update for update in adapter.updates}[name] for name in ("lm_head", "model.embed_tokens")
    )
    if tied == "refuse":
        with pytest.raises(MismatchError, match="tied"):
            placed("qwen2", tensors, folder, adapter)
        return
    base = tiny.write_gguf(folder / "tied.gguf", "qwen2", tensors)
    with GgufReader(base) as reader:
        placement = gguf_pairs(adapter, reader, tied=tied)
    assert placement.untied == (tied == "separate")
    pairs = {pair.name: pair for pair in placement.pairs}
    if tied == "separate":
        assert_delta(pairs["output.weight"], head.delta())
        assert_delta(pairs["token_embd.weight"], embedding.delta())
    else:
        assert_delta(pairs["token_embd.weight"], head.delta() + embedding.delta())


def test_an_encoder_is_not_tied(folder):
    with GgufReader(tiny.base_gguf(folder, "bert")) as reader:
        assert not from_base(reader).tied


@pytest.mark.parametrize(
    "part", ["model.visual.blocks.0.attn.qkv", "vision_tower.encoder.layers.0.q_proj", "model.mtp.layers.0.fc"]
)
def test_other_towers_are_ignored_with_a_reason(folder, part):
    adapter = read_adapter(tiny.TINY / "llama" / "adapter")
    adapter.updates.append(replace(adapter.updates[0], name=part, sources=(f"{part}.lora_A", f"{part}.lora_B")))
    with GgufReader(tiny.base_gguf(folder, "llama")) as reader:
        accounts = gguf_pairs(adapter, reader).accounts
    ignored = [account for account in accounts if account.outcome == "ignored"]
    assert [account.tensor for account in ignored] == [f"{part}.lora_A", f"{part}.lora_B"]
    assert all(account.reason for account in ignored)


@pytest.mark.campaign("adapters that do not fit")
def test_what_does_not_fit_is_listed_whole_and_only_passes_by_name(folder):
    adapter = read_adapter(tiny.TINY / "llama" / "adapter")
    stray = [
        replace(adapter.updates[0], name=f"model.layers.{i}.nonsense", sources=(f"stray{i}.lora_A", f"stray{i}.lora_B"))
        for i in range(3)
    ]
    adapter.updates += stray
    with GgufReader(tiny.base_gguf(folder, "llama")) as reader:
        with pytest.raises(MismatchError) as error:
            gguf_pairs(adapter, reader)
        assert len(error.value.details) == 3
        with pytest.raises(MismatchError):
            gguf_pairs(adapter, reader, allow_unused="stray[01]")
        placement = gguf_pairs(adapter, reader, allow_unused="^stray")
    assert sum(account.outcome == "ignored" for account in placement.accounts) == 6


@pytest.mark.campaign("adapters that do not fit")
def test_a_wrong_base_names_what_the_adapter_was_trained_on(folder):
    adapter = read_adapter(tiny.TINY / "gemma2" / "adapter")
    adapter.config["base_model_name_or_path"] = "google/gemma-2-2b"
    with (
        GgufReader(tiny.base_gguf(folder, "gpt2")) as reader,
        pytest.raises(MismatchError, match=r"gpt2.*google/gemma-2-2b"),
    ):
        gguf_pairs(adapter, reader)


@pytest.mark.parametrize(
    "wrapper", ["language_model.model", "model.language_model", "model.text_model", "thinker.model"]
)
def test_wrapped_text_models(folder, wrapper):
    adapter = read_adapter(tiny.TINY / "qwen2" / "adapter")
    adapter.updates = [
        replace(update, name=f"{wrapper}.{update.name.removeprefix('model.')}") for update in adapter.updates
    ]
    with GgufReader(tiny.base_gguf(folder, "qwen2")) as reader:
        names = {pair.name for pair in gguf_pairs(adapter, reader).pairs}
    assert names == deltas("qwen2").keys()


def test_unsloths_modules_of_one_expert_each(tmp_path, folder):
    """gpt-oss as Unsloth unpacks it: a linear layer an expert, gate and up interleaved."""

    def apart(factors, config):
        changed = {name: array for name, array in factors.items() if EXPERTS not in name}
        for path in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
            for outer, module in ((False, "gate_up_projs"), (True, "down_projs")):
                a, b = packed(factors, path, outer)
                for e in range(4):
                    changed[f"base_model.model.{path}.{module}.{e}.lora_A.weight"] = np.ascontiguousarray(a[e])
                    changed[f"base_model.model.{path}.{module}.{e}.lora_B.weight"] = np.ascontiguousarray(b[e])
        return changed, config | {"target_parameters": ["mlp.router.weight"]}

    tensors, wanted = tiny.tensors_of("gpt-oss", from_config(tiny.config_of("gpt-oss"))), deltas("gpt-oss")
    pairs = placed("gpt-oss", tensors, folder, rewritten(tmp_path, "gpt-oss", apart))
    assert pairs.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert_delta(pairs[name], delta)


@pytest.mark.parametrize("trained_on", ["unsloth/Qwen3-30B-A3B-bnb-4bit", "Qwen/Qwen3-30B-A3B"])
def test_unsloths_order_is_a_warning(tmp_path, folder, trained_on):
    adapter = rewritten(tmp_path, "qwen3moe", lambda t, c: (t, c | {"base_model_name_or_path": trained_on}))
    with GgufReader(tiny.base_gguf(folder, "qwen3moe")) as reader:
        warnings = gguf_pairs(adapter, reader).warnings
    assert bool(warnings) == trained_on.startswith("unsloth") and all("--expert-b-layout" in line for line in warnings)


def written(folder, name, **metadata):
    """The adapter of a tiny model as a GGUF."""
    from lora_gguf.api import convert

    return convert(tiny.TINY / name / "adapter", folder / f"{name}.lora.gguf", base_config=tiny.TINY / name, force=True)


def placed_gguf(folder, name, tensors, **options):
    written(folder, name)
    with GgufReader(tiny.write_gguf(folder / "changed.gguf", name, tensors)) as reader:
        return adapter_gguf_pairs(folder / f"{name}.lora.gguf", reader, **options)


def test_an_adapter_gguf_on_a_fused_base_and_on_a_split_one(folder):
    tensors, wanted = tiny.tensors_of("llama", from_config(tiny.config_of("llama"))), deltas("llama")
    for layer in range(2):
        parts = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([tensors.pop(part) for part in parts])
    pairs = {pair.name: pair for pair in placed_gguf(folder, "llama", tensors).pairs}
    assert_delta(
        pairs["blk.0.attn_qkv.weight"], np.concatenate([wanted[f"blk.0.attn_{part}.weight"] for part in "qkv"])
    )
    tensors, wanted = tiny.tensors_of("phi3", from_config(tiny.config_of("phi3"))), deltas("phi3")
    for layer in range(2):
        q, k, v = np.split(tensors.pop(f"blk.{layer}.attn_qkv.weight"), [32, 48])
        tensors |= {f"blk.{layer}.attn_q.weight": q, f"blk.{layer}.attn_k.weight": k, f"blk.{layer}.attn_v.weight": v}
    pairs = {pair.name: pair for pair in placed_gguf(folder, "phi3", tensors).pairs}
    for part, delta in zip("qkv", np.split(wanted["blk.1.attn_qkv.weight"], [32, 48]), strict=True):
        assert_delta(pairs[f"blk.1.attn_{part}.weight"], delta)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3", "deepseek2"])
def test_an_adapter_gguf_gives_the_same_as_its_directory(folder, name):
    placement = placed_gguf(folder, name, tiny.tensors_of(name, from_config(tiny.config_of(name))))
    wanted = deltas(name)
    assert {pair.name for pair in placement.pairs} == wanted.keys()
    for pair in placement.pairs:
        assert_delta(pair, wanted[pair.name])
    assert {account.outcome for account in placement.accounts} == {"applied"}


def test_an_adapter_gguf_keeps_its_invocation_tokens_and_names_what_it_ignores(tmp_path):
    pair = LoraPair("blk.0.attn_q.weight", np.ones((2, 32), np.float32), np.ones((32, 2), np.float32), 1.0)
    path = tmp_path / "a.gguf"
    write_adapter_gguf(path, [pair], "llama", metadata=[("adapter.alora.invocation_tokens", [4, 5], "u32")])
    with GgufReader(tiny.base_gguf(tmp_path, "llama")) as reader:
        placement = adapter_gguf_pairs(path, reader)
    assert placement.invocation_tokens == [4, 5] and placement.accounts[0].tensor == "blk.0.attn_q.weight.lora_a"


@pytest.mark.campaign("adapters that do not fit")
@pytest.mark.parametrize(("name", "base"), [("llama", "qwen2"), ("qwen2", "qwen3")])
def test_an_adapter_gguf_of_another_model(folder, name, base):
    written(folder, name)
    with GgufReader(tiny.base_gguf(folder, base)) as reader, pytest.raises(MismatchError, match=name):
        adapter_gguf_pairs(folder / f"{name}.lora.gguf", reader)


@pytest.mark.campaign("adapters that do not fit")
@pytest.mark.parametrize("by", ["base", "config"])
def test_a_layer_too_many_is_refused(folder, by):
    adapter = read_adapter(tiny.TINY / "llama" / "adapter")
    adapter.updates = [replace(u, name=u.name.replace("layers.1.", "layers.2.")) for u in adapter.updates]
    with GgufReader(tiny.base_gguf(folder, "llama")) as reader, pytest.raises(MismatchError, match="layer below 2"):
        gguf_pairs(adapter, reader if by == "base" else from_config(tiny.config_of("llama")))
