"""What a model's chat template, a program in Jinja, writes when it is given one user's message and no system prompt.

A template comes with the file, so it runs in Jinja's sandbox, for a second at most, and multiplies nothing.
"""

from __future__ import annotations

import sys
import time
from types import FrameType
from typing import Any

SECONDS = 1.0
MAX_LENGTH = 200_000  # characters of a template
MARK = "\N{OBJECT REPLACEMENT CHARACTER}lora-gguf\N{OBJECT REPLACEMENT CHARACTER}"
DATES = ("strftime_now", "date_string")  # what a template with today's date in it asks for


def default_system(template: str, before: str, after: str) -> str | None:
    """Return the system prompt that ``template`` writes where a conversation has none, between ``before`` and
    ``after``; None where there is none, where it has today's date in it, or where the template fails.
    """
    if len(template) > MAX_LENGTH or any(word in template for word in DATES):
        return None
    head = rendered(template).partition(MARK)[0]
    text = head.partition(before)[2].partition(after)[0].strip() if before in head else ""
    return text if text and text.replace("\n", "").isprintable() and '"""' not in text else None


def rendered(template: str) -> str:
    """Return what ``template`` writes for a user's message ``MARK``; nothing where it fails or takes too long."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, _context: Any, operator: str, _left: Any, _right: Any) -> Any:
            raise OverflowError(operator)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Limited(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    messages = [{"role": "user", "content": MARK}]
    before = sys.gettrace()
    sys.settrace(_until(time.monotonic() + SECONDS))
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token="", tools=None
        )
    except Exception:
        return ""
    finally:
        sys.settrace(before)


def _until(deadline: float) -> Any:
    """Return a trace function that ends what runs after ``deadline``."""

    def trace(_frame: FrameType, _event: str, _argument: object) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError
        return trace

    return trace
