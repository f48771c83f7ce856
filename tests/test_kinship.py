"""Whether the base is the adapter's: names as adapters, GGUFs and quantizers write them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.checks.kinship import architectures_of, by_class, by_name
from lora_gguf.checks.remarks import NOTE, OK, WARNING
from lora_gguf.commands.doctor import doctor
from lora_gguf.files.gguf_writer import key_value
from tests import tiny
from tests.common import FIXTURES, smollm2_path, text_kv
from tests.test_cli import run
from tests.test_completeness import lessened
from tests.test_merge import base_and_adapter

PERL = FIXTURES / "perl-adapter"


class Model:
    """As much of a base as its kinship takes."""

    def __init__(self, name="", architecture="llama", n=0, path="model.gguf", **kv):
        self.kv = {"general.name": name, **{f"general.{key}": value for key, value in kv.items()}}
        self.architecture, self.path = architecture, SimpleNamespace(name=path)
        self.tensors = {"t": SimpleNamespace(n_elements=n)}

    def get(self, key, default=None):
        return self.kv.get(key, default)


SMOLLM2 = Model("Smollm2 135M 8k Lc100K Mix1 Ep2", n=134_515_008, basename="smollm2", size_label="135M")
LLAMA = Model("Llama 3.2 1B Instruct", n=1_235_814_432, size_label="1B", basename="Llama-3.2", finetune="Instruct")
LLAMA31 = Model("Meta Llama 3.1 8B Instruct", n=8_030_261_312)
QWEN = Model("Qwen2.5 7B Instruct", "qwen2", 7_615_616_512)
MISTRAL = Model("Mistral 7B Instruct v0.3", n=7_248_023_552)
GEMMA = Model("Gemma 3 270m", "gemma3", 268_098_176, basename="gemma-3", size_label="270M")
PHI = Model("", "phi3", 3_821_079_552, path="phi3.gguf")
R1 = Model("DeepSeek R1 Distill Qwen 7B", "qwen2", 7_615_616_512)
MIXTRAL = Model("Mixtral 8x7B Instruct v0.1", n=46_702_792_704)
BARE = Model("", n=1_235_814_432)
FALCON3 = Model("Falcon3 1B Instruct", n=1_669_408_768)

AGREE = [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2), ("unsloth/SmolLM2-135M-bnb-4bit", SMOLLM2),
    ("/home/me/models/smollm2-135m-instruct/", SMOLLM2), ("C:\\models\\SmolLM2-135M", SMOLLM2),
    ("HUGGINGFACETB/SMOLLM2-135M", SMOLLM2), ("HuggingFaceTB/SmolLM2-135M-Instruct-GGUF", SMOLLM2),
    ("/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123abcd", SMOLLM2),
    ("meta-llama/Llama-3.2-1B-Instruct", LLAMA), ("unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit", LLAMA),
    ("meta-llama/Llama-3.2-1B", LLAMA), ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", LLAMA),
    ("meta-llama/Llama-3.2-1B", Model("", n=1_235_814_432, path="Llama-3.2-1B-Instruct-Q4_K_M.gguf")),
    ("meta-llama/Llama-3.2-1B", Model("HF Snapshot", n=1_235_814_432, path="llama-3.2-1b.Q8_0.gguf")),
    ("meta-llama/Llama-3.1-8B-Instruct", LLAMA31), ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", LLAMA31),
    ("NousResearch/Meta-Llama-3.1-8B", LLAMA31), ("NousResearch/Hermes-3-Llama-3.1-8B", LLAMA31),
    ("meta-llama/Llama-2-7b-hf", Model("LLaMA v2", n=6_738_415_616)),
    ("Qwen/Qwen2.5-7B-Instruct", QWEN), ("unsloth/Qwen2.5-7B", QWEN), ("qwen/qwen2.5-7b-instruct-awq", QWEN),
    ("mistralai/Mistral-7B-Instruct-v0.3", MISTRAL), ("unsloth/mistral-7b-v0.3-bnb-4bit", MISTRAL),
    ("google/gemma-3-270m", GEMMA), ("unsloth/gemma-3-270m-it-unsloth-bnb-4bit", GEMMA),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", R1), ("mistralai/Mixtral-8x7B-v0.1", MIXTRAL),
    ("tiiuae/Falcon3-1B-Base", FALCON3), ("acme/our-model-v2", Model("Our Model V2")),
    ("acme/thing", Model("", **{"base_model.count": 1, "base_model.0.repo_url": "https://huggingface.co/acme/thing"})),
]  # fmt: skip
DISAGREE = [
    ("HuggingFaceTB/SmolLM2-360M", SMOLLM2), ("meta-llama/Llama-3.2-1B", SMOLLM2),
    ("HuggingFaceTB/SmolLM-135M", SMOLLM2), ("HuggingFaceTB/SmolLM3-3B", SMOLLM2), ("google/gemma-3-270m", SMOLLM2),
    ("meta-llama/Llama-3.2-3B", LLAMA), ("meta-llama/Llama-3.1-8B", LLAMA), ("Qwen/Qwen2-7B", QWEN),
    ("Qwen/Qwen1.5-7B", QWEN), ("Qwen/Qwen-7B", QWEN), ("meta-llama/Meta-Llama-3-8B", LLAMA31),
    ("mistralai/Mistral-7B-v0.1", MISTRAL), ("meta-llama/Llama-2-7b-hf", MISTRAL), ("tiiuae/falcon-7b", PHI),
    ("Qwen/Qwen2.5-0.5B", BARE), ("google/gemma-2-2b", GEMMA), ("google/gemma-2b", PHI),
    ("meta-llama/Llama-3.2-3B", BARE), ("EleutherAI/pythia-160m", SMOLLM2),
    ("unsloth/Qwen2.5-7B-bnb-4bit", Model("Llama 3 8B", n=8_030_261_312)),
]  # fmt: skip
CANNOT_TELL = [
    ("", LLAMA), ("./checkpoint-500", LLAMA), ("/data/out/final", QWEN), ("acme/our-model", LLAMA),
    ("meta-llama/Llama-3.2-1B", BARE), ("model", SMOLLM2), ("dolphin", LLAMA), ("../exp-13b/merged", LLAMA),
    ("acme/our-model", Model("Models")), ("x" * 100_000, LLAMA), ("a-" * 50_000, LLAMA),
]  # fmt: skip


@pytest.mark.parametrize(("stated", "base"), AGREE)
def test_the_same_model_in_other_words(stated, base):
    assert by_name(stated, base).level == OK, by_name(stated, base)


@pytest.mark.parametrize(("stated", "base"), DISAGREE)
def test_another_model(stated, base):
    assert by_name(stated, base).level == WARNING, by_name(stated, base)


@pytest.mark.parametrize(("stated", "base"), CANNOT_TELL)
def test_names_that_say_nothing(stated, base):
    found = by_name(stated, base)
    assert found.level == NOTE and "cannot tell" in found.text and len(found.text) < 300


@pytest.mark.parametrize(
    ("name", "architecture", "level"),
    [
        ("LlamaForCausalLM", "llama", OK),
        ("LlamaForSequenceClassification", "llama", OK),
        ("MistralForCausalLM", "llama", OK),
        ("Qwen2ForCausalLM", "llama", WARNING),
        ("FalconForCausalLM", "phi3", WARNING),
        ("Qwen2ForCausalLM", "qwen2", OK),
        ("Gemma3ForConditionalGeneration", "gemma3", OK),
        ("BertModel", "bert", OK),
        ("GPT2LMHeadModel", "gpt2", OK),
        ("SomethingOfTomorrow", "llama", None),
        (None, "llama", None),
        (5, "llama", None),
    ],
)
def test_classes(name, architecture, level):
    found = list(by_class({"auto_mapping": {"base_model_class": name}}, Model("", architecture)))
    assert [remark.level for remark in found] == ([level] if level else [])


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_tiny_model_s_own_class_agrees(tmp_path, name):
    config = json.loads((tiny.TINY / name / "adapter" / "adapter_config.json").read_text())
    report = doctor(tiny.base_gguf(tmp_path, name), [(tiny.TINY / name / "adapter", 1.0)])
    (remark,) = [remark for remark in report.remarks if remark.topic == "class"]
    assert remark.level == OK, (remark, config["auto_mapping"])
    assert not [remark for remark in report.remarks if remark.topic == "base" and remark.level == WARNING]


def test_a_task_that_the_base_has_no_head_for():
    (found,) = by_class({"task_type": "SEQ_CLS"}, Model())
    assert found.level == WARNING and not list(by_class({"task_type": "CAUSAL_LM"}, Model()))


def test_every_class_of_the_table_is_known_by_any_of_its_heads():
    assert "qwen2" in architectures_of("Qwen2ForTokenClassification") and not architectures_of("Model")


def test_merge_warns_and_doctor_always_says(tmp_path, capsys):
    other = lessened(tmp_path / "other", PERL, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    for adapter, warned in ((PERL, False), (other, True)):
        code, _, err = run(capsys, "merge", smollm2_path(), adapter, "--dry-run")
        assert code == 0 and ("is this the adapter's base?" in err) == warned
        code, out, _ = run(capsys, "doctor", smollm2_path(), adapter)
        assert code == 0 and ("they agree" in out) != warned and ("but the base is" in out) == warned


def test_another_tokenizer_is_warned_of_in_a_merge(tmp_path, capsys):
    adapter = lessened(tmp_path / "a", PERL)
    vocabulary = {f"word{i}": i for i in range(1000)}
    (adapter / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    code, _, err = run(capsys, "merge", smollm2_path(), adapter, "--dry-run")
    assert code == 0 and "a: vocabulary: 1000 of 1000 tokens differ" in err


def test_an_adapter_gguf_says_it_too(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    entries = [("general.base_model.0.name", "gemma-3-1b", "str"), ("general.base_model.count", 1, "u32")]
    pair = LoraPair("blk.0.ffn_up.weight", np.ones((1, 512), np.float32), np.ones((64, 1), np.float32), 1.0)
    write_adapter_gguf(tmp_path / "b.gguf", [pair], "llama", metadata=entries)
    assert key_value(*entries[0]) == text_kv(*entries[0][:2])
    code, _, err = run(capsys, "merge", base, tmp_path / "b.gguf", "--dry-run")
    assert code == 0 and "trained on gemma-3-1b, but the base is of the architecture llama" in err
