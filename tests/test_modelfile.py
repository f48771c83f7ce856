"""Modelfiles for Ollama: their templates write what llama.cpp writes for the same family of chats."""

from __future__ import annotations

import ctypes
import os
import re
import time

import pytest

from lora_gguf.errors import FileError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.merging.modelfile import CHAT_TEMPLATE, FAMILIES, SAMPLING, family_of, modelfile
from lora_gguf.merging.options import Policy
from tests.calls import merge
from tests.common import gemma3_path, ggml, smollm2_path
from tests.test_cli import run
from tests.test_merge import base_and_adapter

SYSTEM, ASKED, ANSWERED, AGAIN = "Be brief.", "Hello?", "Hi.", "And you?"


class Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


def by_llama_cpp(template: str, *messages: tuple[str, str]) -> str:
    chat = (Message * len(messages))(*[Message(role.encode(), content.encode()) for role, content in messages])
    buffer = ctypes.create_string_buffer(4096)
    n = ggml().llama_chat_apply_template(template.encode(), chat, ctypes.c_size_t(len(messages)), True, buffer, 4096)
    assert n > 0, "llama.cpp knows no such template"
    return buffer.raw[:n].decode()


def go(template: str, **variables: str) -> str:
    """A Go template of nothing but ``if`` and variables, as text/template writes it."""
    while "{{ if" in template:
        template = re.sub(
            r"\{\{ if \.(\w+) \}\}((?:(?!\{\{ (?:if|end)).)*)\{\{ end \}\}",
            lambda match: match[2] if variables.get(match[1]) else "",
            template,
            flags=re.DOTALL,
        )
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda match: variables.get(match[1], ""), template)


def generating(template: str, **variables: str) -> str:
    """What Ollama sends to have an answer: nothing after the response."""
    return go(template.partition("{{ .Response }}")[0], **variables)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_is_written_as_llama_cpp_writes_it(name):
    family = FAMILIES[name]
    jinja, template = " ".join(family.marks), family.go_template()
    assert family_of(jinja) is family
    user, answer = ("user", ASKED), ("assistant", ANSWERED)
    assert generating(template, Prompt=ASKED) == by_llama_cpp(jinja, user)
    assert generating(template, System=SYSTEM, Prompt=ASKED) == by_llama_cpp(jinja, ("system", SYSTEM), user)
    history = go(template, System=SYSTEM, Prompt=ASKED, Response=ANSWERED) + generating(template, Prompt=AGAIN)
    assert history == by_llama_cpp(jinja, ("system", SYSTEM), user, answer, ("user", AGAIN))


class WithKeys:
    """A base of which only the metadata matters."""

    def __init__(self, architecture="llama", **kv):
        self.architecture, self.kv = architecture, kv

    def get(self, key, default=None):
        return self.kv.get(key, default)


def lines(base, name="m.gguf"):
    return modelfile(base, name).splitlines()


def test_of_a_real_chat_model():
    with Base(smollm2_path()) as base:
        text, jinja = modelfile(base, "a b.gguf"), base.get(CHAT_TEMPLATE)
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    assert text.startswith("FROM ./a b.gguf\n")
    assert generating(template, System=SYSTEM, Prompt=ASKED) == by_llama_cpp(jinja, ("system", SYSTEM), ("user", ASKED))
    assert [line for line in text.splitlines() if "PARAMETER" in line] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|im_start|>"',
        "PARAMETER num_ctx 8192",
    ]


def test_of_a_model_without_a_chat_template():
    with Base(gemma3_path()) as base:
        found = lines(base)
    assert not any(line.startswith("TEMPLATE") for line in found) and any("no chat template" in line for line in found)
    assert (
        'PARAMETER stop "<eos>"' in found
        and "PARAMETER num_ctx 8192" in found
        and any("32768" in line for line in found)
    )


def test_a_template_of_no_known_family_is_left_to_ollama():
    found = lines(WithKeys(**{CHAT_TEMPLATE: "{{ '[INST]' + messages[0] + '[/INST]' }}"}))
    assert not any(line.startswith("TEMPLATE") for line in found) and any(
        "ollama show --template" in line for line in found
    )


def test_what_is_left_out_is_said():
    found = lines(WithKeys(**{CHAT_TEMPLATE: "<|im_start|><|im_end|> tools <think>"}))
    assert any("without its part for tools and think" in line for line in found)


def test_parameters_that_the_base_recommends():
    keys = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.min_p": "x",
        "llama.context_length": 2048,
    }
    found = lines(WithKeys(**keys))
    assert found[-3:] == ["PARAMETER num_ctx 2048", "PARAMETER temperature 0.6", "PARAMETER top_k 20"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5", [1.0]])
def test_what_is_no_finite_number_is_no_parameter(value):
    keys = {f"general.sampling.{key}": value for key in SAMPLING}
    found = lines(WithKeys(**keys, **{"llama.context_length": True, "tokenizer.ggml.eos_token_id": True}))
    assert not [line for line in found if line.startswith("PARAMETER")]


def test_whole_numbers_stay_whole():
    keys = {"general.sampling.top_k": 1_000_000, "general.sampling.penalty_last_n": -1, "general.sampling.temp": 1}
    assert lines(WithKeys(**keys))[-3:] == [
        "PARAMETER temperature 1",
        "PARAMETER top_k 1000000",
        "PARAMETER repeat_last_n -1",
    ]


def test_tokens_that_would_break_out_of_their_line_are_left_out():
    tokens = ['"\nSYSTEM evil', "</s>"]
    ids = {"eos_token_id": 0, "eot_token_id": 1, "eom_token_id": 9}
    kv = {f"tokenizer.ggml.{key}": value for key, value in {"tokens": tokens, **ids}.items()}
    found = lines(WithKeys(**kv))
    assert [line for line in found if line.startswith("PARAMETER")] == ['PARAMETER stop "</s>"'] and "evil" not in str(
        found
    )
    with pytest.raises(UsageError, match="cannot hold this name"):
        modelfile(WithKeys(), "a\nADAPTER x.gguf")


def test_the_command_writes_it_beside_the_merged_file(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    out = tmp_path / "out.v1.gguf"
    code, _, err = run(capsys, "merge", base, adapter, "-o", out, "--modelfile")
    path = tmp_path / "out.v1.Modelfile"
    assert (
        code == 0 and path.read_text().startswith("FROM ./out.v1.gguf\n") and f"ollama create out.v1 -f {path}" in err
    )
    out.unlink()
    path.write_text("mine")
    code, _, err = run(capsys, "merge", base, adapter, "-o", out, "--modelfile")
    assert code == FileError.exit_code and "exists already" in err and path.read_text() == "mine" and not out.exists()
    assert (
        run(capsys, "merge", base, adapter, "-o", out, "--modelfile", "--force")[0] == 0 and "FROM" in path.read_text()
    )


def test_shards_are_refused_before_anything_is_written(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "F32", rows=512)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match="Ollama takes one file"):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy("nearest"), max_bytes=1 << 20, modelfile=True)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_default_system_prompt_is_what_the_template_writes():
    with Base(smollm2_path()) as base:
        written, jinja = lines(base), base.get(CHAT_TEMPLATE)
    prompt = by_transformers_way(jinja).partition("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
    assert f'SYSTEM """{prompt}"""' in written and prompt.startswith("You are a helpful AI assistant named SmolLM")
    assert {'PARAMETER stop "<|im_start|>"', 'PARAMETER stop "<|im_end|>"'} <= set(written)


def by_transformers_way(jinja: str) -> str:
    """What a template writes for one message, in the environment that transformers gives it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(jinja).render(messages=[{"role": "user", "content": ASKED}])


@pytest.mark.parametrize(
    ("jinja", "system"),
    [
        ("{% set s = 'You are set.' %}{{ '<|im_start|>system\n' + s + '<|im_end|>\n' }}", "You are set."),
        ("{{ '<|im_start|>system\n' }}{{ 'You are in parts.' }}{{ '<|im_end|>\n' }}", "You are in parts."),
        ("{{ '<|im_start|>system\nOn ' + strftime_now('%d') + '<|im_end|>\n' }}", None),
        ("", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ 'unclosed", None),
        ("{{ '<|im_start|>system\n' + '\"\"\"' + '<|im_end|>\n' }}", None),
        ("{{ '<|im_start|>system\n' + 'a' * 1000000000 + '<|im_end|>\n' }}", None),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", None),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", None),
    ],
)
def test_a_template_of_any_kind(jinja, system):
    users = "{% for m in messages %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    start = time.monotonic()
    written = lines(WithKeys(**{CHAT_TEMPLATE: jinja + users}))
    assert time.monotonic() - start < 3
    assert [line for line in written if line.startswith("SYSTEM")] == ([f'SYSTEM """{system}"""'] if system else [])
