"""An Ollama Modelfile for a GGUF: where the model lies, its chat template in Go's notation, where it stops.

Format: https://docs.ollama.com/modelfile. Ollama writes chats with templates in Go's notation. Where a Modelfile has
none, it compares the GGUF's Jinja template with those that it knows. Where none is near, Ollama up to 0.32 passes
prompts on bare; from 0.33 on it renders the GGUF's own, which it does whatever TEMPLATE says where that has tools or
thinking. So a template is written here for the families whose turns all look the same; for others a comment says what
to do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lora_gguf.errors import UsageError, printable
from lora_gguf.files.base import Base
from lora_gguf.merging.chat import DATES, MARK, default_system

MAX_CONTEXT = 8192  # tokens; a larger context costs memory, so only its owner can say
CHAT_TEMPLATE = "tokenizer.chat_template"
SPECIAL = ("eos", "eot", "eom")
# GGUF's recommended sampling -> Ollama's parameter, and what it must be
SAMPLING = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_last_n": ("repeat_last_n", int),
    "penalty_repeat": ("repeat_penalty", float),
}


@dataclass(frozen=True)
class Family:
    """A format of chats: ``turn`` with its role and text, and what ends it. ``marks`` are in the Jinja template of
    each; a model that writes one of ``more_stops`` has begun a turn that is not its own.
    """

    marks: tuple[str, ...]
    turn: str
    assistant: str = "assistant"
    system_in_user: bool = False
    more_stops: tuple[str, ...] = ()

    @property
    def stop(self) -> str:
        return self.turn.partition("{text}")[2].strip()

    def default_system(self, jinja: str) -> str | None:
        """Return the system prompt that the Jinja template of a model writes where a conversation has none."""
        before, _, after = self._turn("system", MARK).partition(MARK)
        return None if self.system_in_user else default_system(jinja, before.rstrip("\n"), after.strip())

    def go_template(self) -> str:
        """Return one exchange with Ollama's variables; it repeats it for each of a conversation."""
        system, user = "{{ .System }}", "{{ .Prompt }}"
        if self.system_in_user:
            head, user = "", f"{{{{ if .System }}}}{system}\n\n{{{{ end }}}}{user}"
        else:
            head = f"{{{{ if .System }}}}{self._turn('system', system)}{{{{ end }}}}"
        prompt = f"{{{{ if .Prompt }}}}{self._turn('user', user)}{{{{ end }}}}"
        return f"{head}{prompt}{self._turn(self.assistant, '{{ .Response }}')}"

    def _turn(self, role: str, text: str) -> str:
        return self.turn.replace("{role}", role).replace("{text}", text)


# the first family whose marks are all there is taken
FAMILIES = {
    "Phi-4": Family(
        ("<|im_start|>", "<|im_sep|>"),
        "<|im_start|>{role}<|im_sep|>{text}<|im_end|>",
        more_stops=("<|im_start|>", "<|im_sep|>"),
    ),
    "ChatML": Family(
        ("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n{text}<|im_end|>\n", more_stops=("<|im_start|>",)
    ),
    "Llama 3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
        more_stops=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "Gemma": Family(("<start_of_turn>",), "<start_of_turn>{role}\n{text}<end_of_turn>\n", "model", system_in_user=True),
    "Granite": Family(("<|start_of_role|>",), "<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"),
    "Phi-3": Family(
        ("<|user|>", "<|end|>", "<|assistant|>"),
        "<|{role}|>\n{text}<|end|>\n",
        more_stops=("<|user|>", "<|assistant|>"),
    ),
}
_NO_TEMPLATE = "# The base has no chat template: it continues text. Give it one with TEMPLATE if it was tuned to chat."
_UNKNOWN = """# The base's chat template is of no family known here, so TEMPLATE is left to Ollama, which knows more.
# Look at `ollama show --template NAME`: where it prints {{ .Prompt }}, Ollama did not know it either: write a
# TEMPLATE."""


def modelfile(base: Base, file_name: str, mmproj: str | None = None) -> str:
    """Return the Modelfile for the GGUF ``file_name``, which lies beside it and has the metadata of ``base``;
    ``mmproj`` is that of its towers.

    Raises ``UsageError`` for a name that a Modelfile cannot hold.
    """
    files = [name for name in (file_name, mmproj) if name]
    if strange := [name for name in files if not name.isprintable()]:
        raise UsageError(f"{printable(strange[0])}: a Modelfile cannot hold this name: name another output")
    family = family_of(str(base.get(CHAT_TEMPLATE) or ""))
    stops = dict.fromkeys([*special_tokens(base), *(filter(None, [family.stop, *family.more_stops]) if family else ())])
    lines = [*(f"FROM ./{name}" for name in files), "", *_template(base, family), ""]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if _quotable(stop)]
    return "\n".join([*lines, *_context(base), *_sampling(base)]) + "\n"


def family_of(jinja: str) -> Family | None:
    """Return the family of chats that a Jinja template writes, by the marks in it; None for others."""
    return next((family for family in FAMILIES.values() if all(mark in jinja for mark in family.marks)), None)


def special_tokens(base: Base) -> list[str]:
    """Return the tokens that end an answer, as text."""
    tokens = base.get("tokenizer.ggml.tokens") or []
    numbers = [base.get(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL]
    return [str(tokens[number]) for number in numbers if type(number) is int and 0 <= number < len(tokens)]


def _template(base: Base, family: Family | None) -> list[str]:
    jinja = base.get(CHAT_TEMPLATE)
    if not family:
        return [_UNKNOWN if jinja else _NO_TEMPLATE]
    name = next(name for name, known in FAMILIES.items() if known is family)
    more = [word for word in ("tools", "think") if re.search(rf"\b{word}|<{word}", str(jinja))]
    without = f", without its part for {' and '.join(more)}" if more else ""
    return [
        f"# The base's chat template ({name}) in Go's notation{without}.",
        f'TEMPLATE """{family.go_template()}"""',
        *_system(family, str(jinja)),
    ]


def _system(family: Family, jinja: str) -> list[str]:
    """Return the template's own system prompt, which Ollama would not know of."""
    if any(word in jinja for word in DATES) and not family.system_in_user:
        return ["# Its system prompt has today's date in it, so none is written here."]
    text = family.default_system(jinja)
    return [] if text is None else [f'SYSTEM """{text}"""']


def _context(base: Base) -> list[str]:
    n_tokens = base.get(f"{base.architecture}.context_length")
    if type(n_tokens) is not int or n_tokens <= 0:
        return []
    more = (
        [f"# The model was made for {n_tokens} tokens; a larger num_ctx takes more memory."]
        if n_tokens > MAX_CONTEXT
        else []
    )
    return [*more, f"PARAMETER num_ctx {min(n_tokens, MAX_CONTEXT)}"]


def _sampling(base: Base) -> list[str]:
    found = {name: (base.get(f"general.sampling.{key}"), kind) for key, (name, kind) in SAMPLING.items()}
    return [f"PARAMETER {name} {_number(value)}" for name, (value, kind) in found.items() if _is_a(kind, value)]


def _is_a(kind: type, value: object) -> bool:
    """Return whether a value of the metadata is a finite number of this kind; a flag is none."""
    return isinstance(value, int | float) and type(value) in (kind, int) and math.isfinite(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _quotable(text: str) -> bool:
    return text.isprintable() and '"' not in text
