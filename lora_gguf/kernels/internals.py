"""What kernels use of Numba's inside, in one place: it differs between versions, and those that were tried are few.

Raises ``UnsupportedError`` where the Numba at hand lacks some of it, or cannot be imported at all.
"""

from __future__ import annotations

from lora_gguf.errors import UnsupportedError, printable

TRIED = "0.60 to 0.68"  # as in pyproject.toml

try:
    import numba
    from llvmlite import ir
    from numba.core import cgutils, entrypoints, types
    from numba.core.caching import FunctionCache
    from numba.core.errors import TypingError
    from numba.core.imputils import lower_builtin
    from numba.core.runtime import rtsys
    from numba.core.typing.templates import AbstractTemplate, infer_global, signature
    from numba.extending import intrinsic, models, register_model

    _ = FunctionCache._load_overload, rtsys.initialize
    # extensions of Numba by others have no say here, and to look for them means to read the metadata of every package
    entrypoints._already_initialized = True
except (ImportError, AttributeError) as error:
    raise UnsupportedError(
        f"numba: {printable(error)}: lora-gguf works with {TRIED}: pip install 'numba>=0.60,<0.69' in its environment"
    ) from error

__all__ = [
    "AbstractTemplate",
    "FunctionCache",
    "TypingError",
    "cgutils",
    "infer_global",
    "intrinsic",
    "ir",
    "lower_builtin",
    "models",
    "numba",
    "register_model",
    "rtsys",
    "signature",
    "types",
]
