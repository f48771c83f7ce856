"""Adapters for another base, as a user meets them: one line, exit code 5, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.errors import MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from tests.common import FIXTURES, pack_gguf, u32_kv
from tests.contract import check_preserved, check_refusal
from tests.faulty import OLD
from tests.forked import snapshot
from tests.tiny import TINY, base_gguf

Tensors = dict[str, np.ndarray]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def peft(folder: Path, of: str, change: Callable[[Tensors], Tensors] = dict, **config) -> None:
    """The adapter ``of`` a tiny model or of a kind as ``adapter`` in ``folder``, its tensors and configuration
    changed.
    """
    source = TINY / of / "adapter" if (TINY / of).is_dir() else FIXTURES / "kinds" / of
    (folder / "adapter").mkdir()
    tensors = change(load_file(source / "adapter_model.safetensors"))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    settings = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def gguf(folder: Path, architecture: str, **shapes: tuple[tuple, tuple]) -> None:
    """An adapter GGUF as ``adapter.gguf`` in ``folder``: tensors of block 0 by the shapes of A and B."""
    pairs = [
        LoraPair(f"blk.0.{name}.weight", np.ones(a, np.float32), np.ones(b, np.float32), 1.0)
        for name, (a, b) in shapes.items()
    ]
    write_adapter_gguf(folder / "adapter.gguf", pairs, architecture)


def sized(pattern: str, axis: int, size: int) -> Callable[[Tensors], Tensors]:
    """A change: the tensors whose name ``pattern`` finds are repeated or cut to ``size`` along ``axis``."""
    return lambda tensors: {
        name: np.take(array, np.arange(size) % array.shape[axis], axis) if re.search(pattern, name) else array
        for name, array in tensors.items()
    }


def renamed(pattern: str, to: str) -> Callable[[Tensors], Tensors]:
    """A change of names."""
    return lambda tensors: {re.sub(pattern, to, name): array for name, array in tensors.items()}


def width(size: int) -> Callable[[Tensors], Tensors]:
    """A change: the adapter is of a model of another width, everywhere."""
    inward, outward = r"(q|k|v|gate|up)_proj.lora_A", r"(o|down)_proj.lora_B"
    return lambda tensors: sized(outward, 0, size)(sized(inward, 1, size)(tensors))


def transposed(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: array.T if re.search(pattern, name) else array for name, array in tensors.items()}


def swapped(tensors: Tensors) -> Tensors:
    """A as B of the module's transpose."""
    return {name.translate(str.maketrans("AB", "BA")): array.T for name, array in tensors.items()}


def repacked(folder: Path, name: str, drop: str = "nothing", **key_values: int) -> None:
    """The tiny model ``name`` as ``base.gguf`` without the tensors that ``drop`` finds, and with other numbers in its
    header.
    """
    with GgufReader(base_gguf(folder, name)) as reader:
        pairs = dict(zip(reader.kv, raw_key_values(reader)))
        pairs |= {f"{name}.{key}": u32_kv(f"{name}.{key}", number) for key, number in key_values.items()}
        kept = [info for info in reader.tensors.values() if not re.search(drop, info.name)]
        tensors = [(info.name, info.type.name, info.shape, reader.read(info).tobytes()) for info in kept]
    (folder / "base.gguf").write_bytes(pack_gguf(list(pairs.values()), tensors))


# what is wrong -> (the base's name, or what writes base.gguf; what writes the adapter; what the error says)
OF_LORA = {
    "of GPT-2, for Llama": ("llama", lambda f: peft(f, "gpt2"), "no tensor of llama"),
    "of BERT, for Llama": ("llama", lambda f: peft(f, "bert"), "4 of 12 modules"),
    "of Falcon, for Llama": ("llama", lambda f: peft(f, "falcon"), "no tensor of llama"),
    "of Llama, for GPT-2": ("gpt2", lambda f: peft(f, "llama"), "no tensor of gpt2"),
    "of Llama, for BERT": ("bert", lambda f: peft(f, "llama"), "no tensor of bert"),
    "of DeepSeek, for Llama": ("llama", lambda f: peft(f, "deepseek2"), "llama"),
    "of Llama, for DeepSeek": ("deepseek2", lambda f: peft(f, "llama"), "attn_k.*not found"),
    "of experts, for a dense model": ("qwen3", lambda f: peft(f, "qwen3moe"), "qwen3"),
    "of a dense model, for experts": ("qwen3moe", lambda f: peft(f, "qwen3"), "no tensor of qwen3moe"),
    "of a wider sibling": ("llama", lambda f: peft(f, "llama", width(64)), r"expected .*32.*found .*64"),
    "of a narrower sibling": ("llama", lambda f: peft(f, "llama", width(16)), r"expected .*32.*found .*16"),
    "of a deeper sibling": ("llama", lambda f: peft(f, "llama", lambda t: t | renamed(r"layers\.1\.", "layers.2.")(t)), "layer below 2"),
    "of a base of one layer more": (
        lambda f: repacked(f, "llama", r"blk\.1\.", block_count=1), lambda f: peft(f, "llama"), "layer below 1",
    ),
    "of other feed-forward width": ("llama", lambda f: peft(f, "llama", sized("(gate|up)_proj.lora_B", 0, 64)), r"48, 32.*64, 32"),
    "of one module that is wider": ("llama", lambda f: peft(f, "llama", sized(r"1\.mlp\.up_proj.lora_B", 0, 64)), "1 of 14 modules"),
    "of fewer heads of keys": ("llama", lambda f: peft(f, "llama", sized("[kv]_proj.lora_B", 0, 8)), r"16, 32.*8, 32"),
    "of heads that do not divide": ("llama", lambda f: peft(f, "llama", sized("q_proj.lora_B", 0, 30)), "q_proj|attn_q"),
    "with A and B swapped": ("llama", lambda f: peft(f, "llama", swapped), r"48"),
    "of a larger vocabulary": ("qwen2", lambda f: peft(f, "embedding", lambda t: vocabulary(t, 300)), "291|300|vocabulary|tokens"),
    "of a base without one of its tensors": (lambda f: repacked(f, "llama", r"blk\.1\.attn_k\."), lambda f: peft(f, "llama"), "attn_k.*not found"),
    "of experts that are wider": ("qwen3moe", lambda f: peft(f, "qwen3moe", sized(r"experts\.(base_layer\.)?lora_B", 0, 80)), "exps"),
    "of more experts": ("qwen3moe", lambda f: peft(f, "qwen3moe", more_experts), "expert|exps"),
    "of vision alone": ("llama", lambda f: peft(f, "llama", renamed(r"model\.layers", "vision_tower.layers")), "text model"),
    "of modules that no model has": ("llama", lambda f: peft(f, "llama", renamed("_proj", "_prong")), "prong"),
}  # fmt: skip


def vocabulary(tensors: Tensors, size: int) -> Tensors:
    return sized("lora_embedding_A", 1, size)(sized("lm_head.lora_B", 0, size)(tensors))


def more_experts(tensors: Tensors) -> Tensors:
    """Twice the rank of the packed experts: as many factors as eight experts have."""
    return sized(r"experts\..*lora_B", 1, 32)(sized(r"experts\..*lora_A", 0, 32)(tensors))


# likewise, for kinds of adapters that only a merge takes
OF_OTHER_KINDS = {
    "DoRA's magnitudes": (
        "qwen2",
        lambda f: peft(f, "dora", sized("q_proj.*(lora_B|magnitude)", 0, 64)),
        "q_proj|attn_q",
    ),
    "IA3's vectors": ("qwen2", lambda f: peft(f, "ia3", sized("q_proj", 0, 64)), "q_proj|attn_q"),
    "LoHa's factors": ("qwen2", lambda f: peft(f, "loha", sized("q_proj.hada_w._b", 1, 64)), "q_proj|attn_q"),
    "LoKr's factors": ("qwen2", lambda f: peft(f, "lokr", sized("q_proj.lokr_w1", 0, 8)), "q_proj|attn_q"),
    "OFT's blocks": ("qwen2", lambda f: peft(f, "oft", sized("q_proj", 0, 8)), "q_proj|attn_q"),
    "BOFT's blocks": ("qwen2", lambda f: peft(f, "boft", sized("q_proj.boft_R", 1, 16)), "q_proj|attn_q"),
    "VeRA's vectors": ("qwen2", lambda f: peft(f, "vera", sized("q_proj.vera_lambda_b", 0, 24)), "q_proj|attn_q"),
    "whole norms": ("qwen2", lambda f: peft(f, "norms", sized("input_layernorm", 0, 64)), "norm"),
    "a whole head of another width": ("qwen2", lambda f: peft(f, "whole", sized("lm_head", 1, 64)), "lm_head|output"),
    "rows of tokens of another width": (
        "qwen2",
        lambda f: peft(f, "tokens", sized("tokens_delta", 1, 64)),
        "embd|embed",
    ),
    "the bias of another width": (
        "qwen2",
        lambda f: peft(f, "bias-all", sized("q_proj.base_layer.bias", 0, 64)),
        "bias",
    ),
}

OF_GGUF = {
    "a GGUF of another architecture": ("llama", lambda f: gguf(f, "qwen2", attn_q=((4, 32), (32, 4))), "expected an adapter for llama"),
    "a GGUF of no known architecture": ("llama", lambda f: gguf(f, "x\x1b[2J", attn_q=((4, 32), (32, 4))), "expected an adapter for llama"),
    "a GGUF of a wider model": ("llama", lambda f: gguf(f, "llama", attn_q=((4, 64), (64, 4))), r"32, 32.*64, 64"),
    "a GGUF with a tensor too tall": ("llama", lambda f: gguf(f, "llama", attn_k=((4, 32), (32, 4))), r"16, 32.*32, 32"),
    "a GGUF with factors transposed": ("llama", lambda f: gguf(f, "llama", ffn_up=((4, 48), (32, 4))), r"48, 32.*32, 48"),
    "a GGUF with a tensor that is not there": ("llama", lambda f: gguf(f, "llama", attn_q_a=((4, 32), (32, 4))), "attn_q_a"),
    "a GGUF of experts, for a dense model": ("qwen3", lambda f: gguf(f, "qwen3", ffn_up_exps=((4, 2, 32), (4, 24, 2))), "exps"),
    "a GGUF of more experts": ("qwen3moe", lambda f: gguf(f, "qwen3moe", ffn_up_exps=((8, 2, 32), (8, 24, 2))), r"4, 24, 32.*8, 24, 32"),
    "a GGUF of a dense tensor, for experts": ("qwen3moe", lambda f: gguf(f, "qwen3moe", ffn_up_exps=((2, 32), (24, 2))), "exps"),
    "a GGUF of a norm": ("llama", lambda f: gguf(f, "llama", attn_norm=((1, 32), (32, 1))), "attn_norm"),
    "a GGUF of a head, for a tied base": (
        lambda f: repacked(f, "llama", "^output.weight"), lambda f: gguf(f, "llama", attn_q=((4, 64), (32, 4))), r"32, 32.*32, 64",
    ),
}  # fmt: skip

CASES = [
    *((command, name) for name in OF_LORA for command in ("merge", "convert", "doctor")),
    *(("merge", name) for name in (*OF_OTHER_KINDS, *OF_GGUF)),
]
ARGUMENTS = {
    "merge": "merge base.gguf {} -o out.gguf --force -t 1",
    "convert": "convert {} --base base.gguf -o out.gguf --force",
    "doctor": "doctor base.gguf {}",
}


@pytest.mark.campaign("adapters that do not fit")
@pytest.mark.parametrize(("command", "name"), CASES)
def test_an_adapter_for_another_base(case, tmp_path, command, name):
    base, adapter, expected = {**OF_LORA, **OF_OTHER_KINDS, **OF_GGUF}[name]
    if isinstance(base, str):
        base_gguf(tmp_path, base).rename(tmp_path / "base.gguf")
    else:
        base(tmp_path)
    adapter(tmp_path)
    (tmp_path / "out.gguf").write_bytes(OLD)
    before = snapshot(tmp_path)
    source = "adapter.gguf" if "adapter.gguf" in before else "adapter"
    result = case.forge.run(*ARGUMENTS[command].format(source).split(), cwd=tmp_path)
    check_refusal(result, {MismatchError.exit_code})
    check_preserved(tmp_path, before)
    assert re.search(expected, result.err)
