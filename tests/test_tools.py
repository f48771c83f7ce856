"""Adapters as tools other than PEFT save them: what a merge makes of each is what the tool means."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from libgguf import dequantize_rows, quantize_rows
from safetensors.numpy import load_file, save_file

from lora_gguf import api
from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.lora import decode
from lora_gguf.errors import FileError, MalformedError, MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.mapping.hparams import from_config
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES

PREFIX = "base_model.model."
NAMES = ("embed_tokens", "lm_head")
TORCHTUNE, MLX = FIXTURES / "torchtune", FIXTURES / "mlx"


def written(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def assert_holds(base, source, folder, wanted, atol=3e-6, scale=1.0, **options):
    """A merge changes the tensors ``wanted`` to what they are there, and no others."""
    merge(base, [(source, scale)], folder / "merged.gguf", force=True, **options)
    with GgufReader(base) as before, GgufReader(folder / "merged.gguf") as after:
        for name, info in after.tensors.items():
            found = decode(after, info)
            expected = wanted[name] if name in wanted else decode(before, before.tensors[name])
            np.testing.assert_allclose(
                found, expected.reshape(found.shape), rtol=0, atol=atol if name in wanted else 0, err_msg=name
            )


def model_of(name):
    return from_config(tiny.config_of(name))


def peft(name):
    """The tensors and the configuration of the fixture's adapter, and PEFT's merged weights."""
    folder = tiny.TINY / name / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config, tiny.tensors_of(name, model_of(name), "merged")


def fsdp(name):
    """As Axolotl saves a compiled model under FSDP: wrappers at every level."""
    path = name.removeprefix(PREFIX).replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    )
    return f"_orig_mod.{PREFIX}_orig_mod.{path}"


RENAMED = {
    "fsdp": fsdp,
    "named": lambda name: name.replace("lora_A.weight", "lora_A.my-run.weight").replace(
        "lora_B.weight", "lora_B.my-run.weight"
    ),
    "default": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "DDP": lambda name: f"module.{name}",
    "DDP in PEFT": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "TRL with a value head": lambda name: f"pretrained_model.{name}",
    "an actor": lambda name: f"actor.module.{name}",
    "sentence-transformers": lambda name: f"0.auto_model.{name.removeprefix(PREFIX)}",
    "sentence-transformers in PEFT": lambda name: name.replace(PREFIX, f"{PREFIX}0.auto_model."),
    "PEFT twice": lambda name: PREFIX + name,
    "down and up": lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "small letters": lambda name: name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
    "a text model in a vision model": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "the same, transformers 4": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
}


@pytest.mark.parametrize("form", RENAMED)
def test_the_same_adapter_under_other_names(tmp_path, form):
    tensors, config, wanted = peft("llama")
    source = written(tmp_path / "a", {RENAMED[form](name): array for name, array in tensors.items()}, **config)
    assert_holds(tiny.base_gguf(tmp_path, "llama"), source, tmp_path, wanted)


def as_npz(path, tensors):
    np.savez(path, **tensors)


def as_shards(path, tensors):
    names = sorted(tensors)
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        save_file(part, path.with_name(f"adapter_model-0000{i + 1}-of-00002.safetensors"))


FILES = {
    "adapters.npz": as_npz,
    "model.safetensors": lambda path, tensors: save_file(tensors, path),
    "0000100_adapters.safetensors": lambda path, tensors: save_file(tensors, path),
    "adapter_model-0000x-of-00002.safetensors": as_shards,
}


@pytest.mark.parametrize("name", FILES)
def test_weights_under_other_names(tmp_path, name):
    tensors, config, wanted = peft("llama")
    source = written(tmp_path / "a", tensors, **config)
    (source / "adapter_model.safetensors").unlink()
    FILES[name](source / name, tensors)
    assert_holds(tiny.base_gguf(tmp_path, "llama"), source, tmp_path, wanted)
    assert api.inspect(source).ranks


@pytest.mark.parametrize("name", ["adapter_model.pt", "pytorch_model.bin"])
def test_torchs_file_under_other_names(tmp_path, name):
    found = []
    for called in ("adapter_model.bin", name):
        (tmp_path / called).mkdir()
        (tmp_path / called / called).write_bytes((FIXTURES / "bin" / "adapter.bin").read_bytes())
        (tmp_path / called / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
        found.append({update.name: update.delta() for update in read_adapter(tmp_path / called).updates})
    assert found[0].keys() == found[1].keys() and found[0]
    for path, delta in found[0].items():
        np.testing.assert_array_equal(found[1][path], delta)


def test_the_last_of_mlxs_checkpoints_or_the_one_that_is_named(tmp_path):
    tensors, config, wanted = peft("llama")
    source = written(tmp_path / "a", tensors, **config)
    (source / "adapter_model.safetensors").rename(source / "0000200_adapters.safetensors")
    zeros = {name: np.zeros_like(array) for name, array in tensors.items()}
    save_file(zeros, source / "0000100_adapters.safetensors")
    base = tiny.base_gguf(tmp_path, "llama")
    assert_holds(base, source, tmp_path, wanted)
    pairs = read_adapter(source / "0000100_adapters.safetensors").updates
    assert not any(pair.b.any() for pair in pairs)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["weights.pt", "lora.safetensors"], "found lora.safetensors, weights.pt: name it"),
        ([], "found none: download it again"),
        (["adapters.npz", "pytorch_model.bin"], "name one of adapters.npz, pytorch_model.bin"),
        (["model-00001-of-00002.safetensors"], "1 of its 2 shards are here"),
        (["a-00001-of-00001.bin", "b-00001-of-00001.bin"], "shards of several files"),
    ],
)
def test_a_folder_whose_weights_are_not_clear_names_the_files(tmp_path, names, says):
    tensors, config, _ = peft("llama")
    source = written(tmp_path / "a", tensors, **config)
    kept = (source / "adapter_model.safetensors").read_bytes()
    (source / "adapter_model.safetensors").unlink()
    for name in names:
        (source / name).write_bytes(kept)
    with pytest.raises(FileError, match=says):
        read_adapter(source)
    if "lora.safetensors" in names:
        assert read_adapter(source / "lora.safetensors").updates


def test_mlx_vlm(tmp_path):
    """A (in, r) and B (r, out), each update times alpha."""
    tensors, config, wanted = peft("llama")
    names = {".lora_A.weight": ".A", ".lora_B.weight": ".B"}
    turned = {
        f"language_model.{name.removeprefix(PREFIX).replace(name[-14:], names[name[-14:]])}": array.T
        for name, array in tensors.items()
    }
    source = written(tmp_path / "a", turned)
    said = {"rank": config["r"], "alpha": config["lora_alpha"] / config["r"], "dropout": 0.0}
    (source / "adapter_config.json").write_text(json.dumps(said))
    base = tiny.base_gguf(tmp_path, "llama")
    assert_holds(base, source, tmp_path, wanted)
    # its 0.5.0 multiplied by alpha / rank: the line that says so gives what to do
    (source / "adapter_config.json").write_text(json.dumps(said | {"alpha": config["lora_alpha"]}))
    report = merge(base, [(source, 1.0)], tmp_path / "doubted.gguf")
    (scale,) = re.findall(r"mlx-vlm 0\.5\.0.*--scale (\S+)$", "\n".join(report.warnings))
    assert_holds(base, source, tmp_path, wanted, scale=float(scale))


def test_mlx_vlm_of_today(tmp_path):
    """As mlx-lm, within the text model of a larger one."""
    tensors = load_file(MLX / "llama" / "adapters.safetensors")
    source = tmp_path / "a"
    source.mkdir()
    save_file({f"language_model.{name}": array for name, array in tensors.items()}, source / "adapters.safetensors")
    said = json.loads((MLX / "llama" / "adapter_config.json").read_text())
    said["lora_parameters"]["keys"] = [f"language_model.{key}" for key in said["lora_parameters"]["keys"]]
    (source / "adapter_config.json").write_text(json.dumps(said))
    wanted = tiny.tensors_from(MLX / "llama" / "merged.safetensors", model_of("llama"))
    assert_holds(tiny.base_gguf(tmp_path, "llama"), source, tmp_path, wanted)


def test_tinkers_head_and_the_enums_own_name(tmp_path):
    tensors, config, wanted = peft("llama")
    a, b = np.ones((4, 32), np.float32), np.full((288, 4), 0.01, np.float32)
    head = {f"{PREFIX}model.unembed_tokens.lora_A.weight": a, f"{PREFIX}model.unembed_tokens.lora_B.weight": b}
    source = written(tmp_path / "a", tensors | head, **config | {"peft_type": "PeftType.LORA"})
    scale = config["lora_alpha"] / config["r"]
    base = tiny.base_gguf(tmp_path, "llama")
    with GgufReader(base) as reader:
        old = reader.read(reader.tensors["output.weight"]).view("<f4").reshape(288, 32)
        assert_holds(base, source, tmp_path, wanted | {"output.weight": old + scale * (b @ a)})


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gpt-oss"])
def test_tinker(tmp_path, name):
    """As its cookbook merges: a head of its own name, all experts in one tensor, one factor shared by them."""
    folder = FIXTURES / "tinker" / name
    wanted = tiny.tensors_from(folder / "merged.safetensors", model_of(name))
    assert_holds(tiny.base_gguf(tmp_path, name), folder, tmp_path, wanted)


def test_tinkers_experts_that_do_not_multiply(tmp_path):
    a, b = np.ones((3, 4, 32), np.float32), np.ones((2, 24, 4), np.float32)
    names = [f"{PREFIX}model.layers.0.mlp.experts.w1.lora_{half}.weight" for half in "AB"]
    for shapes in ((a, b), (a, b[:, :, :2]), (a, b[0])):
        with pytest.raises(MalformedError, match="do not multiply, expert by expert"):
            read_adapter(written(tmp_path / "a", dict(zip(names, shapes, strict=True)), r=4, lora_alpha=4))


def test_a_missing_rank_is_said_once(tmp_path):
    tensors, config, _ = peft("llama")
    with pytest.raises(MalformedError, match="adapter_config.json: r: expected a number") as refusal:
        read_adapter(written(tmp_path / "a", tensors, **{k: v for k, v in config.items() if k != "r"}))
    assert not refusal.value.details


def torchtunes(folder, name, weights="adapter_model.pt"):
    """A folder of torchtune's, with the weights that are asked for alone, and the model's base GGUF."""
    (folder / "a").mkdir()
    shutil.copy(TORCHTUNE / name / weights, folder / "a")
    config = TORCHTUNE / name / "adapter_config.json"  # of Phi it saves none: its user writes r and lora_alpha
    text = config.read_text() if config.exists() else json.dumps({"r": 4, "lora_alpha": 6})
    (folder / "a" / "adapter_config.json").write_text(text)
    return folder / "a", tiny.base_gguf(folder, name.partition("-")[0])


def torchtunes_merge(name):
    """What torchtune's own merge, saved for transformers, is in GGUF."""
    return tiny.tensors_from(TORCHTUNE / name / "merged.safetensors", model_of(name.partition("-")[0]))


@pytest.mark.parametrize("name", ["llama", "llama-dora", "qwen2", "gemma2", "phi3"])
def test_torchtunes_own_files(tmp_path, name):
    source, base = torchtunes(tmp_path, name)
    assert_holds(base, source, tmp_path, torchtunes_merge(name))


def test_torchtunes_checkpoints_of_several_epochs(tmp_path):
    source, base = torchtunes(tmp_path, "llama")
    (source / "adapter_model.pt").rename(source / "adapter_10.pt")
    (source / "adapter_9.pt").write_bytes(b"an earlier one")
    assert_holds(base, source, tmp_path, torchtunes_merge("llama"))


def test_what_torchtune_saves_as_peft_is_doubted_where_it_is_wrong(tmp_path):
    """It reorders q and k of Qwen, which are in transformers' order already."""
    for name in ("llama", "qwen2"):
        (tmp_path / name).mkdir()
        source, base = torchtunes(tmp_path / name, name, "adapter_model.safetensors")
        report = merge(base, [(source, 1.0)], tmp_path / name / "m.gguf")
        doubted = [line for line in report.warnings if "torchtune" in line and "adapter_model.pt" in line]
        assert len(doubted) == (name == "qwen2")
        with GgufReader(tmp_path / name / "m.gguf") as reader:
            far = {
                key
                for key, wanted in torchtunes_merge(name).items()
                if not np.allclose(decode(reader, reader.tensors[key]), wanted, atol=3e-6)
            }
        assert {key.split(".")[2] for key in far} == ({"attn_q", "attn_k"} if doubted else set())


def test_torchtunes_dora_as_peft_names_the_file_to_take(tmp_path):
    """Its configuration says nothing of DoRA, and the magnitudes of q and k keep the order of the rows before."""
    source, base = torchtunes(tmp_path, "llama-dora", "adapter_model.safetensors")
    with pytest.raises(MalformedError, match=r"torchtune.*adapter_model\.pt"):
        merge(base, [(source, 1.0)], tmp_path / "no.gguf")


def test_torchtunes_rows_that_no_head_has(tmp_path):
    source, _ = torchtunes(tmp_path, "llama")
    with pytest.raises(MismatchError, match="q_proj: 32 rows do not divide by the 5 heads of .*: is it the base"):
        api.convert(source, tmp_path / "a.gguf", base_config=config_with(tmp_path, num_attention_heads=5))


def config_with(folder, **fields):
    """A base's config.json, changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(tiny.config_of("llama") | fields))
    return path


@pytest.mark.parametrize("head", ["score", "v_head.summary"])
def test_reward_heads_are_named_with_the_way_out(tmp_path, head):
    tensors, config, wanted = peft("llama")
    more = {f"{PREFIX}{head}.weight": np.ones((1, 32), np.float32)}
    source = written(tmp_path / "a", tensors | more, **config)
    base = tiny.base_gguf(tmp_path, "llama")
    with pytest.raises(MismatchError, match=rf"{head}: a reward .*--allow-unused '{head.partition('.')[0]}'"):
        api.merge(base, source, tmp_path / "out.gguf")
    assert_holds(base, source, tmp_path, wanted, allow_unused=head.partition(".")[0])


def test_unsloth_with_trained_embeddings(tmp_path):
    """A regular expression as targets, a 4-bit base, embeddings whole under the names that PEFT keeps in a
    checkpoint.
    """
    tensors, config, wanted = peft("qwen2")
    rng = np.random.default_rng(3)
    whole = {name: rng.standard_normal((288, 32)).astype(np.float32) for name in NAMES}
    tensors[f"{PREFIX}model.embed_tokens.modules_to_save.default.weight"] = whole["embed_tokens"]
    tensors[f"{PREFIX}lm_head.modules_to_save.default.weight"] = whole["lm_head"]
    config |= {
        "base_model_name_or_path": "unsloth/qwen2-bnb-4bit", "modules_to_save": list(NAMES),
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)",
    }  # fmt: skip
    wanted |= {"token_embd.weight": whole["embed_tokens"], "output.weight": whole["lm_head"]}
    assert_holds(tiny.base_gguf(tmp_path, "qwen2"), written(tmp_path / "a", tensors, **config), tmp_path, wanted)


def extracted(before, after, name):
    """The two factors of a difference, by mergekit's decomposition at full rank."""
    u, sizes, v = np.linalg.svd((after - before).astype(np.float64), full_matrices=False)
    root = np.sqrt(sizes)
    return {f"{name}A": v * root[:, None], f"{name}B": u * root}


@pytest.mark.parametrize("n_new", [0, 2])
def test_mergekit(tmp_path, n_new):
    """mergekit-extract-lora: linear layers, head and embedding as factors, norms whole, a vocabulary that may have
    grown.
    """
    before = {
        key: array.astype(np.float32) for key, array in load_file(tiny.TINY / "qwen2" / "base.safetensors").items()
    }
    rng = np.random.default_rng(9)
    tensors, ranks, after = {}, {}, {}
    for key, array in before.items():
        path = key.removesuffix(".weight")
        grown = n_new if path.endswith(NAMES) else 0
        resized = (
            np.concatenate([array, rng.normal(0, 0.02, (grown, *array.shape[1:])).astype(np.float32)])
            if grown
            else array
        )
        after[key] = resized + rng.standard_normal(resized.shape).astype(np.float32) * 0.05
        if key.endswith(".bias"):
            after[key] = array
        elif array.ndim == 1:
            tensors[PREFIX + key] = after[key]
        elif path.endswith("embed_tokens"):
            tensors |= extracted(resized.T, after[key].T, f"{PREFIX}{path}.lora_embedding_")
            ranks[path] = min(array.shape)
        else:
            factors = extracted(resized, after[key], f"{PREFIX}{path}.lora_")
            tensors |= {f"{name}.weight": factor for name, factor in factors.items()}
            ranks[path] = min(array.shape)
        if grown:
            tensors[f"{PREFIX}{path}.base_layer.weight"] = resized
    norms = [key.removesuffix(".weight") for key in before if before[key].ndim == 1 and key.endswith("weight")]
    patterns = {"r": 32, "lora_alpha": 32, "rank_pattern": ranks, "alpha_pattern": ranks}
    source = written(tmp_path / "a", tensors, modules_to_save=norms, target_modules=list(ranks), **patterns)
    if n_new:
        (source / "added_tokens.json").write_text(json.dumps({"<a>": 288, "<b>": 289}))
    save_file(after, tmp_path / "after.safetensors")
    wanted = tiny.tensors_from(tmp_path / "after.safetensors", model_of("qwen2"))
    assert_holds(tiny.base_gguf(tmp_path, "qwen2"), source, tmp_path, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-dora", "qwen3moe", "gemma3"])
def test_mlx(tmp_path, name):
    """mlx-lm's own files against what it fuses: factors transposed, stacked experts, a scale of its own."""
    model = name.partition("-")[0]
    wanted = tiny.tensors_from(MLX / name / "merged.safetensors", model_of(model))
    assert_holds(tiny.base_gguf(tmp_path, model), MLX / name, tmp_path, wanted)


@pytest.mark.parametrize("form", ["adapters.npz", "0000100_adapters.safetensors", "0000100_adapters.npz"])
def test_mlxs_older_files_and_checkpoints(tmp_path, form):
    tensors = load_file(MLX / "llama" / "adapters.safetensors")
    (tmp_path / "a").mkdir()
    shutil.copy(MLX / "llama" / "adapter_config.json", tmp_path / "a")
    np.savez(tmp_path / "a" / form, **tensors) if form.endswith("npz") else save_file(tensors, tmp_path / "a" / form)
    wanted = tiny.tensors_from(MLX / "llama" / "merged.safetensors", model_of("llama"))
    assert_holds(tiny.base_gguf(tmp_path, "llama"), tmp_path / "a", tmp_path, wanted)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4"])
def test_adapter_ggufs_of_any_type(tmp_path, type_name):
    """Both factors as another tool may have quantized them; the update is that of the numbers that they hold."""
    rng = np.random.default_rng(4)
    stem, kind = "blk.0.attn_output.weight", BY_NAME[type_name]
    a, b = (rng.standard_normal((32, 32)).astype(np.float32) * 0.1 for _ in range(2))
    stored = {}
    for name, array in ((f"{stem}.lora_a", a), (f"{stem}.lora_b", b)):
        raw = {
            "F32": array,
            "F16": array.astype(np.float16),
            "BF16": (array.view(np.uint32) >> 16).astype(np.uint16),
        }.get(type_name)
        stored[name] = np.frombuffer(bytes(quantize_rows(array, kind.id)), np.uint8) if raw is None else raw
    values = [
        np.asarray(dequantize_rows(raw.view(np.uint8).reshape(32, -1), kind.id, n_per_row=32)).reshape(32, 32)
        if kind.block_size > 1 else
        (raw.astype(np.uint32) << 16).view(np.float32) if type_name == "BF16" else raw.astype(np.float32)
        for raw in stored.values()
    ]  # fmt: skip
    header = [
        ("general.architecture", "llama", "str"),
        ("general.type", "adapter", "str"),
        ("adapter.type", "lora", "str"),
    ]
    header += [("adapter.lora.alpha", 16.0, "f32")]
    with GgufWriter(
        tmp_path / "a.gguf", [key_value(*h) for h in header], [TensorSpec(n, kind, (32, 32)) for n in stored]
    ) as writer:
        for name, raw in stored.items():
            writer.write(writer.tensors[name], 0, np.ascontiguousarray(raw))
        writer.commit()
    base = tiny.base_gguf(tmp_path, "llama")
    with GgufReader(base) as reader:
        before = decode(reader, reader.tensors[stem])
    assert_holds(base, tmp_path / "a.gguf", tmp_path, {stem: before + 0.5 * values[1] @ values[0]}, atol=2e-6)


def test_a_value_head_is_a_leftover(tmp_path):
    """TRL's PPO leaves the head of its value model beside the adapter."""
    tensors, config, wanted = peft("llama")
    source = written(tmp_path / "a", tensors | {"v_head.summary.weight": np.ones((1, 32), np.float32)}, **config)
    base = tiny.base_gguf(tmp_path, "llama")
    with pytest.raises(Exception, match="v_head.summary"):
        merge(base, [(source, 1.0)], tmp_path / "no.gguf")
    assert_holds(base, source, tmp_path, wanted, allow_unused="v_head")
    source = written(tmp_path / "b", tensors | {"training_step": np.ones(1, np.float32)}, **config)
    with pytest.raises(MalformedError, match="training_step"):
        merge(base, [(source, 1.0)], tmp_path / "no.gguf")
    assert_holds(base, source, tmp_path, wanted, allow_unused="^training")


def test_two_runs_in_one_file_are_told_apart_or_refused(tmp_path):
    tensors, config, _ = peft("llama")
    second = {name.replace(".weight", ".second.weight"): array for name, array in tensors.items()}
    with pytest.raises(MalformedError, match="save one adapter alone"):
        merge(
            tiny.base_gguf(tmp_path, "llama"),
            [(written(tmp_path / "a", tensors | second, **config), 1.0)],
            tmp_path / "no.gguf",
        )
