"""The ways out that refusals give where they lead through PEFT: PEFT goes them, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import MismatchError, UnsupportedError
from tests import tiny
from tests.calls import merge
from tests.test_tools import assert_holds, model_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = [[1, 80, 120, 99]]
SOME = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
LORA = dict(r=4, lora_alpha=6, target_modules=SOME)


def adapted(name, config):
    """The model ``name`` of ``fixtures/tiny``, adapted, with values that show in all that is trained."""
    from safetensors.torch import load_file

    kind = getattr(transformers, tiny.config_of(name)["architectures"][0])
    model = kind(kind.config_class.from_pretrained(tiny.TINY / name))
    weights = {key: value.float() for key, value in load_file(tiny.TINY / name / "base.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def refused(model, folder):
    """Why the adapter is refused, saved by PEFT."""
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedError) as refusal:
        merge(tiny.base_gguf(folder, "llama"), [(folder, 1.0)], None)
    return str(refusal.value)


def assert_pefts_merge_holds(model):
    with torch.no_grad():
        wanted = model(torch.tensor(IDS)).logits
        torch.testing.assert_close(model.merge_and_unload()(torch.tensor(IDS)).logits, wanted, rtol=1e-4, atol=1e-4)


def test_kasa_is_merged_by_peft(tmp_path):
    model = adapted("llama", peft.LoraConfig(**LORA, kasa_config=peft.KasaConfig()))
    assert "merge it with PEFT" in refused(model, tmp_path)
    assert_pefts_merge_holds(model)


def test_replicated_layers_are_merged_by_peft_once_each_has_its_own_weights(tmp_path):
    model = adapted("llama", peft.LoraConfig(**LORA | dict(layer_replication=[[0, 2], [0, 2]])))
    said = refused(model, tmp_path)
    assert "module.base_layer.weight = Parameter(module.base_layer.weight.clone())" in said
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight = torch.nn.Parameter(module.base_layer.weight.clone())
    assert_pefts_merge_holds(model)


@pytest.mark.parametrize("kind", ["C3AConfig", "FourierFTConfig", "RandLoraConfig"])
def test_other_kinds_become_lora(tmp_path, kind):
    """PEFT's conversion at full rank is the same update, and is merged."""
    from safetensors.torch import save_file

    fields = dict(block_size=8) if kind == "C3AConfig" else {}
    model = adapted("llama", getattr(peft, kind)(target_modules=SOME, **fields))
    (tmp_path / "saved").mkdir()
    assert "convert_to_lora" in refused(model, tmp_path / "saved")
    peft.save_as_lora(tmp_path / "lora", model, rank=32)
    before = {key: value.clone() for key, value in model.base_model.model.state_dict().items()}
    after = model.merge_and_unload().state_dict()
    changed = {key: value for key, value in after.items() if not torch.equal(value, before.get(key, value * 0))}
    changed = {key: value.contiguous() for key, value in changed.items() if any(name in key for name in SOME)}
    save_file(changed, tmp_path / "merged.safetensors")
    wanted = tiny.tensors_from(tmp_path / "merged.safetensors", model_of("llama"))
    assert_holds(tiny.base_gguf(tmp_path, "llama"), tmp_path / "lora", tmp_path, wanted, atol=2e-4)


@pytest.mark.parametrize("kind", ["OFTConfig", "BOFTConfig"])
def test_rotations_of_what_a_gguf_holds_turned_are_merged_by_peft(tmp_path, kind):
    fields = dict(oft_block_size=0, r=2) if kind == "OFTConfig" else dict(boft_block_size=4)
    model = adapted("deepseek2", getattr(peft, kind)(target_modules=["layers.0.self_attn.kv_b_proj"], **fields))
    model.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="which GGUF stores transposed: merge it with PEFT"):
        merge(tiny.base_gguf(tmp_path, "deepseek2"), [(tmp_path, 1.0)], None)
    path = "model.layers.0.self_attn.kv_b_proj"
    layer = model.base_model.model.get_submodule(path)
    inputs = torch.randn(5, layer.in_features)
    with torch.no_grad():
        wanted = layer(inputs)
        torch.testing.assert_close(model.merge_and_unload().get_submodule(path)(inputs), wanted)


def convolution(config):
    """A convolution, adapted, and whether PEFT's merge of it is what it is at run time."""
    torch.manual_seed(4)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def assert_pefts_convolution_holds(model):
    images = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(model.merge_and_unload()(images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_convolutions_of_loha_and_lokr_are_merged_by_peft(tmp_path, kind):
    fields = dict(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True)
    model = convolution(getattr(peft, kind)(**fields))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="of a convolution: merge it with PEFT"):
        read_adapter(tmp_path)
    assert_pefts_convolution_holds(model)


def test_dora_of_a_convolution_is_merged_by_peft():
    assert_pefts_convolution_holds(convolution(peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)))


def test_an_initialised_base_comes_back_by_pefts_conversion(tmp_path):
    """PiSSA saved beside what it began from is LoRA of the unchanged base."""
    config = peft.LoraConfig(**LORA, init_lora_weights="pissa")
    model = adapted("llama", config)
    assert "path_initial_model_for_weight_conversion" in refused(model, tmp_path)
    said: dict = json.loads((Path(tmp_path) / "adapter_config.json").read_text())
    assert said["init_lora_weights"] == "pissa"


WHOLE = {
    "biases": ("qwen2", dict(bias="all")),
    "norms": ("llama", dict(modules_to_save=["norm", "input_layernorm"])),
    "tokens": ("llama", dict(trainable_token_indices={"embed_tokens": [5, 17]})),
}


def assert_peft_merges(what):
    name, fields = WHOLE[what]
    assert_pefts_merge_holds(adapted(name, peft.LoraConfig(**LORA | fields)))


def test_biases_are_merged_by_peft():
    assert_peft_merges("biases")


def test_norms_are_merged_by_peft():
    assert_peft_merges("norms")


def test_tokens_are_merged_by_peft():
    assert_peft_merges("tokens")
