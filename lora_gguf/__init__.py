"""Convert LoRA adapters to GGUF, and merge them into quantized GGUF models.

The commands are functions here; see ``lora_gguf.api``. They load when first used: importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_gguf.api import bases, compare, convert, doctor, extract, fetch, fetch_base, inspect, merge, push, verify
    from lora_gguf.checks.checkup import DoctorReport
    from lora_gguf.checks.compared import CompareReport
    from lora_gguf.checks.inspection import AdapterInspection, Inspection, ModelInspection
    from lora_gguf.commands.extract import Extraction
    from lora_gguf.commands.merge import MergeReport
    from lora_gguf.commands.push import PushReport
    from lora_gguf.commands.verify import VerifyReport
    from lora_gguf.errors import (
        ExecutorError,
        FileError,
        HubError,
        IntegrityError,
        LoraGgufError,
        MalformedError,
        MismatchError,
        NumericError,
        UnprovedError,
        UnsupportedError,
        UsageError,
    )
    from lora_gguf.hub.base_models import Bases
    from lora_gguf.mapping.accounts import Placement
    from lora_gguf.merging.options import Policy

__version__ = "0.1.0"

_HOMES = {
    "lora_gguf.api": (
        "bases", "compare", "convert", "doctor", "extract", "fetch", "fetch_base", "inspect", "merge", "push", "verify",
    ),
    "lora_gguf.checks.checkup": ("DoctorReport",),
    "lora_gguf.checks.compared": ("CompareReport",),
    "lora_gguf.commands.extract": ("Extraction",),
    "lora_gguf.commands.merge": ("MergeReport",),
    "lora_gguf.commands.push": ("PushReport",),
    "lora_gguf.commands.verify": ("VerifyReport",),
    "lora_gguf.errors": (
        "ExecutorError", "FileError", "HubError", "IntegrityError", "LoraGgufError", "MalformedError", "MismatchError",
        "NumericError", "UnprovedError", "UnsupportedError", "UsageError",
    ),
    "lora_gguf.checks.inspection": ("AdapterInspection", "Inspection", "ModelInspection"),
    "lora_gguf.hub.base_models": ("Bases",),
    "lora_gguf.mapping.accounts": ("Placement",),
    "lora_gguf.merging.options": ("Policy",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
