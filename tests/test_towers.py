"""``merge`` on mmproj files: what llama.cpp's own converter makes of PEFT's merge, tower by tower."""

from __future__ import annotations

import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.adapter import module_path
from lora_gguf.adapters.lora import decode
from lora_gguf.api import convert, inspect
from lora_gguf.commands.doctor import doctor
from lora_gguf.commands.merge import merge
from lora_gguf.commands.verify import verify
from lora_gguf.errors import FileError, MismatchError, NumericError, UnsupportedError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.names import is_other_tower
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.towers import TOWERS
from lora_gguf.merging.options import Policy, Resources, Writing
from tests import tiny
from tests.common import FIXTURES, pack_gguf, text_kv
from tests.test_cli import run

FOLDER = FIXTURES / "towers"
NAMES = sorted(path.name for path in FOLDER.iterdir())
HALF = {"F32": 2e-6, "F16": 2**-10}  # what rounding to the type may lose of the largest weight


def arrays(path) -> dict[str, np.ndarray]:
    with GgufReader(path) as reader:
        return {name: decode(reader, info) for name, info in reader.tensors.items()}


def types(path) -> dict[str, str]:
    with GgufReader(path) as reader:
        return {name: info.type.name for name, info in reader.tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_tower_is_merged_as_llama_cpp_converts_pefts_merge(tmp_path, name):
    base, out = FOLDER / name / "mmproj.gguf", tmp_path / "merged.gguf"
    report = merge(base, [(FOLDER / name / "adapter", 1.0)], Writing(out))
    before, after, wanted = arrays(base), arrays(out), load_file(FOLDER / name / "merged.safetensors")
    assert {tensor.target.name for tensor in report.plan.merged} == wanted.keys() and types(out) == types(base)
    for tensor, type in types(base).items():
        expected = wanted.get(tensor, before[tensor])
        if tensor in wanted:
            atol = HALF[type] * max(1, np.abs(expected).max())
            np.testing.assert_allclose(after[tensor], expected, rtol=0, atol=atol, err_msg=tensor)
            assert np.abs(expected - before[tensor]).max() > 10 * atol, tensor
        else:
            np.testing.assert_array_equal(after[tensor], expected, err_msg=tensor)
    saved = load_file(FOLDER / name / "adapter" / "adapter_model.safetensors")
    assert {account.tensor for account in report.accounts} == saved.keys()
    assert {account.outcome for account in report.accounts} == {"applied", "ignored"}
    reasons = {account.reason.split(",")[0].split(":")[0] for account in report.accounts if account.reason}
    assert reasons <= {
        "part of the text model",
        "of a layer that the model does not use",
        "part of what makes speech or pictures",
    }


def test_twelve_families_and_more_are_held_against_llama_cpp():
    kinds = set()
    for name in NAMES:
        with GgufReader(FOLDER / name / "mmproj.gguf") as reader:
            keys = (f"clip.{part}projector_type" for part in ("", "vision.", "audio."))
            kinds |= {reader.get(key) for key in keys if reader.get(key)}
    assert kinds <= TOWERS.keys() and len(kinds) >= 12


@pytest.fixture
def adapter(tmp_path):
    """A copy of an adapter that a test changes: the folder, and a function that saves other tensors in it."""

    def made(name: str, change) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(FOLDER / name / "adapter", folder, dirs_exist_ok=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def test_what_no_tensor_is_known_for_is_refused_with_all_offenders(tmp_path, adapter):
    def rename(tensors):
        for name in list(tensors):
            if ".mlp.fc" in name:
                tensors[name.replace(".mlp.fc", ".mlp.fx")] = tensors.pop(name)

    folder = adapter("smolvlm", rename)
    with pytest.raises(MismatchError, match="mlp.fx1: no tensor of idefics3 mmproj is known by this name") as error:
        merge(FOLDER / "smolvlm" / "mmproj.gguf", [(folder, 1.0)], Writing(tmp_path / "no.gguf"))
    assert len(error.value.details) == 6 and not (tmp_path / "no.gguf").exists()


def test_another_models_tower_is_refused(tmp_path):
    with pytest.raises(MismatchError, match="17 of 18 modules do not fit: is the base of the same"):
        merge(FOLDER / "smolvlm" / "mmproj.gguf", [(FOLDER / "qwen3vl" / "adapter", 1.0)], Writing(tmp_path / "no"))
    with pytest.raises(MismatchError, match="linear_1: no tensor of gemma3 mmproj is known") as error:
        merge(FOLDER / "gemma3" / "mmproj.gguf", [(FOLDER / "lfm2vl" / "adapter", 1.0)], Writing(tmp_path / "no"))
    assert "v.patch_embd.weight: expected (32, 3, 4, 4), found (32, 768)" in error.value.details


def test_an_audio_tower_that_the_file_lacks_is_left_out_and_said_to_be(tmp_path, adapter):
    name = "base_model.model.model.audio_tower.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    folder = adapter("smolvlm", lambda tensors: tensors.update(factors))
    report = merge(FOLDER / "smolvlm" / "mmproj.gguf", [(folder, 1.0)], None)
    reasons = {account.tensor: account.reason for account in report.accounts}
    assert all(reasons[key] == "part of the model's audio tower, which this mmproj does not hold" for key in factors)


def test_a_layer_that_the_file_lacks_is_refused_where_it_was_trained(tmp_path, adapter):
    def train(tensors):
        name = next(name for name in tensors if ".layers.2." in name and "lora_B" in name)
        tensors[name][0, 0] = 1

    folder = adapter("llava", train)
    with pytest.raises(MismatchError, match="expected in mmproj.gguf, not found"):
        merge(FOLDER / "llava" / "mmproj.gguf", [(folder, 1.0)], None)


def test_an_unknown_projector_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "mmproj.gguf"
    head = [text_kv("general.architecture", "clip"), text_kv("clip.projector_type", "of next week")]
    path.write_bytes(pack_gguf(head, [("mm.0.weight", "F32", (4, 4), np.zeros((4, 4), np.float32).tobytes())]))
    with pytest.raises(UnsupportedError, match="projector of next week: .*convert_hf_to_gguf.py --mmproj"):
        merge(path, [(FOLDER / "smolvlm" / "adapter", 1.0)], None)


@pytest.fixture
def whole(tmp_path, adapter):
    """A text model's GGUF and an adapter of it and of SmolVLM's tower: (base, mmproj, adapter)."""

    def retarget(tensors):
        rng = np.random.default_rng(3)
        for name in [name for name in tensors if "text_model" in name]:
            tensors[name] = rng.normal(size=(2, 32) if "lora_A" in name else (32, 2)).astype(np.float32)

    return tiny.base_gguf(tmp_path, "llama"), FOLDER / "smolvlm" / "mmproj.gguf", adapter("smolvlm", retarget)


def test_a_model_and_its_mmproj_are_merged_as_if_one_by_one(tmp_path, whole):
    base, mmproj, source = whole
    for model, out in ((base, "one.gguf"), (mmproj, "two.gguf")):
        merge(model, [(source, 1.0)], Writing(tmp_path / out))
    report = merge(base, [(source, 1.0)], Writing(tmp_path / "both.gguf"), reading=Reading(mmproj=mmproj))
    assert report.written == [tmp_path / "both.gguf", tmp_path / "mmproj-both.gguf"]
    for apart, together in (("one.gguf", "both.gguf"), ("two.gguf", "mmproj-both.gguf")):
        assert (tmp_path / apart).read_bytes() == (tmp_path / together).read_bytes()
    for model, merged in zip((base, mmproj), report.written, strict=True):  # each is proved beside what it was made of
        assert verify(merged, model, [(source, 1.0)]).ok
        assert not verify(merged, model, [(source, 0.5)]).ok
    saved = load_file(source / "adapter_model.safetensors")
    assert {account.tensor for account in report.accounts} == saved.keys() and len(report.accounts) == len(saved)
    assert {account.outcome for account in report.accounts} == {"applied"}
    assert report.as_dict()["mmproj"]["all"]["kept"] == pytest.approx(1)


def test_an_executor_does_both(tmp_path, whole):
    base, mmproj, source = whole
    call, reading = (base, [(source, 1.0)]), Reading(mmproj=mmproj)
    merge(*call, Writing(tmp_path / "here.gguf"), reading=reading)
    with ThreadPoolExecutor(2) as pool:
        merge(*call, Writing(tmp_path / "there.gguf"), reading=reading, resources=Resources(executor=pool))
    for name in ("{}.gguf", "mmproj-{}.gguf"):
        assert (tmp_path / name.format("here")).read_bytes() == (tmp_path / name.format("there")).read_bytes()
    again = merge(*call, Writing(tmp_path / "here.gguf", skip_existing=True), reading=reading)
    assert again.skipped and again.written == [tmp_path / "here.gguf", tmp_path / "mmproj-here.gguf"]


def test_in_a_folder_both_have_their_conventional_names(tmp_path, whole):
    base, mmproj, source = whole
    (tmp_path / "out").mkdir()
    report = merge(base, [(source, 1.0)], Writing(tmp_path / "out"), reading=Reading(mmproj=mmproj))
    text, tower = (path.name for path in report.written)
    assert tower.startswith("mmproj-") and not text.startswith("mmproj") and tower.endswith("-changed-F32.gguf")


@pytest.mark.parametrize("taken", ["both.gguf", "mmproj-both.gguf"])
def test_both_are_written_or_neither(tmp_path, whole, taken):
    base, mmproj, source = whole
    (tmp_path / taken).write_bytes(b"mine")
    with pytest.raises(FileError, match="exists"):
        merge(base, [(source, 1.0)], Writing(tmp_path / "both.gguf"), reading=Reading(mmproj=mmproj))
    assert [path.name for path in tmp_path.glob("*both*")] == [taken] and (tmp_path / taken).read_bytes() == b"mine"


def test_where_one_keeps_too_little_neither_is_written(tmp_path, whole, monkeypatch):
    base, mmproj, source = whole
    with pytest.raises(NumericError, match="min-retention"):
        merge(base, [(source, 1.0)], Writing(tmp_path / "b.gguf"), Policy(min_retention=1.5), Reading(mmproj=mmproj))
    assert not list(tmp_path.glob("*b.gguf"))


def test_the_two_files_must_be_what_they_are_called(tmp_path, whole):
    base, mmproj, source = whole
    for model, towers, said in (
        (base, base, "expected architecture clip, found llama"),
        (mmproj, mmproj, "mmproj too"),
    ):
        with pytest.raises(UsageError, match=said):
            merge(model, [(source, 1.0)], None, reading=Reading(mmproj=towers))
    with pytest.raises(UsageError, match="--shard"):
        merge(base, [(source, 1.0)], Writing(tmp_path / "no.gguf", shard="1/2"), reading=Reading(mmproj=mmproj))


def test_of_two_adapters_each_may_be_of_one_file_alone(tmp_path, whole):
    base, mmproj, source = whole
    tower = FOLDER / "smolvlm" / "adapter"
    text = tmp_path / "text"
    shutil.copytree(source, text)
    factors = {
        name: array for name, array in load_file(text / "adapter_model.safetensors").items() if "text_model" in name
    }
    save_file(factors, text / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="it adapts the text model only"):
        merge(mmproj, [(text, 1.0)], None)
    with pytest.raises(MismatchError, match="it adapts the text model only"):
        merge(base, [(text, 1.0)], None, reading=Reading(mmproj=mmproj))
    report = merge(mmproj, [(text, 1.0), (tower, 2.0)], Writing(tmp_path / "two.gguf"))
    alone = merge(mmproj, [(tower, 2.0)], Writing(tmp_path / "one.gguf"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert len(report.accounts) == len(alone.accounts) + len(factors)


def test_the_text_merge_says_what_waits_and_how_to_merge_it(tmp_path, capsys, whole):
    base, mmproj, source = whole
    code, out, err = run(capsys, "merge", base, source, "-o", tmp_path / "text.gguf", "--scale", "0.5")
    assert code == 0 and "adapter tensors: 40 ignored: part of a vision or audio tower: it waits" in out
    line = next(line for line in err.splitlines() if "lora-gguf merge mmproj.gguf" in line)
    words = shlex.split(line.partition("lora-gguf ")[2])
    code, out, err = run(
        capsys, *[str(mmproj) if word == "mmproj.gguf" else word for word in words], "-o", tmp_path / "m.gguf"
    )
    assert code == 0 and "adapter tensors: 40 applied" in out and "waits" not in err
    code, out, err = run(capsys, "merge", base, source, "--mmproj", mmproj, "--scale", "0.5", "-o", tmp_path / "b.gguf")
    assert code == 0 and "adapter tensors: 42 applied\n" in out + "\n" and "ignored" not in out
    assert (tmp_path / "mmproj-b.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert "waits" not in err and err.count("wrote ") == 2


def test_ollama_gets_both(tmp_path, whole):
    base, mmproj, source = whole
    merge(base, [(source, 1.0)], Writing(tmp_path / "b.gguf", modelfile=True), reading=Reading(mmproj=mmproj))
    assert "FROM ./b.gguf\nFROM ./mmproj-b.gguf\n" in (tmp_path / "b.Modelfile").read_text()
    with pytest.raises(UsageError, match="goes into its model's"):
        merge(mmproj, [(source, 1.0)], Writing(tmp_path / "m.gguf", modelfile=True))
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", NAMES)
def test_verify_holds_a_merged_mmproj_right_and_others_wrong(tmp_path, name):
    base, out, source = FOLDER / name / "mmproj.gguf", tmp_path / "merged.gguf", [(FOLDER / name / "adapter", 1.0)]
    merge(base, source, Writing(out))
    assert verify(out, base, source).ok
    assert "never added" in str(verify(base, base, source).findings[0])
    merge(base, [(source[0][0], 2.0)], Writing(tmp_path / "twice.gguf"))
    assert not verify(tmp_path / "twice.gguf", base, source).ok


def test_an_f16_mmproj_keeps_all_and_verifies(tmp_path, adapter):
    """As published files are: F16 weights, F32 norms and biases."""
    base, weak = FOLDER / "qwen3vl" / "mmproj.gguf", FOLDER / "qwen3vl" / "adapter"
    merge(base, [(weak, 1e-6)], Writing(tmp_path / "f16.gguf"), Policy(type="F16"))
    half = tmp_path / "f16.gguf"
    assert set(types(half).values()) == {"F16", "F32"}
    report = merge(half, [(weak, 0.003)], Writing(tmp_path / "merged.gguf"), reading=Reading(again=True))
    assert report.whole.kept == pytest.approx(1, abs=0.03) and types(tmp_path / "merged.gguf") == types(half)
    assert verify(tmp_path / "merged.gguf", half, [(weak, 0.003)]).ok


def test_inspect_tells_the_towers(tmp_path):
    towers = inspect(FOLDER / "gemma4" / "mmproj.gguf").towers
    assert [(t.part, t.projector, t.n_layers, t.embedding_length, t.n_heads) for t in towers] == [
        ("vision", "gemma4v", 3, 32, 2),
        ("audio", "gemma4a", 3, 32, 2),
    ]
    found = inspect(FOLDER / "llava" / "mmproj.gguf")  # of a converter that knew no general.type
    assert found.kind == "projector of images or sound (mmproj)" and found.towers[0].projector == "mlp"
    merge(FOLDER / "llava" / "mmproj.gguf", [(FOLDER / "llava" / "adapter", 1.0)], Writing(tmp_path / "merged.gguf"))
    assert inspect(tmp_path / "merged.gguf").kind == "merged projector of images or sound (mmproj)"
    assert {ranks.rank for ranks in inspect(FOLDER / "qwen2vl" / "adapter").ranks} == {2}


def test_doctor_knows_an_mmproj_and_what_waits_for_one(whole):
    base, mmproj, source = whole
    report = doctor(mmproj, [(source, 1.0)])
    assert report.refusal is None and not any(remark.topic == "vocabulary" for remark in report.remarks)
    texts = [remark.text for remark in doctor(base, [(source, 1.0)]).remarks if remark.topic == "mmproj"]
    assert texts == ["40 adapter tensors are of a vision or audio tower: merge them too, with --mmproj"]


def test_an_adapter_gguf_of_a_tower_is_refused_as_nobody_loads_it(tmp_path):
    with pytest.raises(UnsupportedError, match="no adapters to an mmproj: merge it instead"):
        convert(FOLDER / "smolvlm" / "adapter", tmp_path / "a.gguf", FOLDER / "smolvlm" / "mmproj.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_merge_knows_every_module_of_a_tower_from_the_text_models(name):
    saved = load_file(FOLDER / name / "adapter" / "adapter_model.safetensors")
    for path in {module_path(tensor.rpartition(".lora_")[0] or tensor.rpartition(".")[0]) for tensor in saved}:
        assert is_other_tower(path) != ("language_model" in path or "text_model" in path), path


# a model, what transformers calls a part of it, and what older versions, or the authors' own code, call it
SPELLINGS = [
    ("gemma3", "model.vision_tower.encoder.", "vision_tower.vision_model.encoder."),
    ("gemma3", "model.multi_modal_projector.", "multi_modal_projector."),
    ("gemma4", ".linear.lora_", ".lora_"),
    ("lfm2vl", "model.vision_tower.encoder.", "model.vision_tower.vision_model.encoder."),
    ("llava", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("llava", "model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("llava", "model.multi_modal_projector.linear_2", "mm_projector.2"),
    ("mistral3", "model.vision_tower.", "vision_tower."),
    ("internvl", "model.multi_modal_projector.linear_2", "mlp1.3"),
    ("internvl", "model.multi_modal_projector.linear_1", "mlp1.1"),
    ("qwen2vl", "model.visual.", "visual."),
    ("qwen25vl", "model.visual.", "thinker.visual."),
    ("qwen3vl", "model.visual.", "visual."),
    ("qwen2audio", "model.audio_tower.", "audio_tower."),
    ("smolvlm", "model.vision_model.", "model.model.vision_model."),
]


@pytest.mark.parametrize(("name", "now", "then"), SPELLINGS)
def test_modules_are_known_by_their_older_names(tmp_path, adapter, name, now, then):
    def rename(tensors):
        for key in [key for key in tensors if now in key]:
            tensors[key.replace(now, then)] = tensors.pop(key)

    merged = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for source, out in zip((FOLDER / name / "adapter", adapter(name, rename)), merged, strict=True):
        assert now in str(load_file(source / "adapter_model.safetensors").keys()) or "changed" in str(source)
        merge(FOLDER / name / "mmproj.gguf", [(source, 1.0)], Writing(out))
    assert arrays(merged[0]).keys() == arrays(merged[1]).keys()
    for tensor, values in arrays(merged[0]).items():
        np.testing.assert_array_equal(arrays(merged[1])[tensor], values)


def test_internvls_own_fused_attention_is_cut_in_three(tmp_path, adapter):
    """The authors' code has q, k and v in one; the same update of one of the three is the same tensor."""

    def fuse(tensors):
        for name in [name for name in tensors if "multi_modal" in name or "embeddings" in name]:
            del tensors[name]
        for name in list(tensors):
            factor = tensors.pop(name)
            if ".attention.k_proj.lora_" in name:
                own = name.replace("vision_tower.encoder.layer", "vision_model.encoder.layers")
                wide = np.zeros((96, 2), np.float32)
                wide[32:64] = factor if "lora_B" in name else 0
                tensors[own.replace("attention.k_proj", "attn.qkv")] = wide if "lora_B" in name else factor

    report = merge(
        FOLDER / "internvl" / "mmproj.gguf", [(adapter("internvl", fuse), 1.0)], Writing(tmp_path / "m.gguf")
    )
    wanted = load_file(FOLDER / "internvl" / "merged.safetensors")
    found, before = arrays(tmp_path / "m.gguf"), arrays(FOLDER / "internvl" / "mmproj.gguf")
    for i in range(4):
        np.testing.assert_allclose(found[f"v.blk.{i}.attn_k.weight"], wanted[f"v.blk.{i}.attn_k.weight"], atol=2e-6)
        np.testing.assert_array_equal(found[f"v.blk.{i}.attn_v.weight"], before[f"v.blk.{i}.attn_v.weight"])
    assert len(report.plan.merged) == 12


def test_a_projector_is_never_taken_for_another_tower(tmp_path, adapter):
    """An mmproj without a vision tower may lack modules of one; those that may be its own must be known."""

    def rename(tensors):
        for name in [name for name in tensors if "multi_modal_projector" in name]:
            tensors[name.replace("projector.linear", "projector.strange")] = tensors.pop(name)

    with pytest.raises(MismatchError, match="strange: no tensor of qwen2a mmproj is known"):
        merge(FOLDER / "qwen2audio" / "mmproj.gguf", [(adapter("qwen2audio", rename), 1.0)], None)
