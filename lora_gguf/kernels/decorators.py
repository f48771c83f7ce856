"""The one decorator of all Numba kernels, and where their machine code is cached.

Kernels compile on first use and are cached in ``$XDG_CACHE_HOME/lora-gguf/kernels-<digest>`` (``LORA_GGUF_CACHE`` names
another folder). Numba notices an edit of a kernel's own file; the digest covers the files whose functions other files'
kernels call, and this one, for its options. Without a writable folder kernels compile anew in each process, and so does
a kernel whose files there are damaged; it replaces them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_gguf.kernels.internals import FunctionCache, numba, rtsys

ROOT = Path(__file__).parent.parent
COVERED = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "merging" / "refit.py"]


def _digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for path in COVERED:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path | None:
    """Return the folder of the compiled kernels, made if need be; None where it cannot be written."""
    home = os.environ.get("LORA_GGUF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "lora-gguf"
    )
    folder = Path(home) / f"kernels-{_digest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        return None
    return folder if writable else None


CACHE = cache_dir()
if CACHE:
    numba.config.CACHE_DIR = str(CACHE)


class _Cache:
    """Numba's cache of a function, but made when it is asked for, and without what it raises where its files are
    damaged: anything that ``pickle`` does.
    """

    def __init__(self, function: Callable[..., Any], allocates: bool) -> None:
        self._function, self._allocates = function, allocates

    @functools.cached_property
    def _files(self) -> FunctionCache:
        return FunctionCache(self._function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with contextlib.suppress(Exception):
            if self._allocates:
                rtsys.initialize(target_context)  # all that is needed of what Numba's own does, in a tenth of the time
            return self._files._load_overload(sig, target_context)
        with contextlib.suppress(Exception):
            self._files.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):
            self._files.save_overload(sig, data)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    # counting who uses an array is a tenth of what there is to compile: it is needed where a kernel makes some
    allocates = not {"empty", "zeros"}.isdisjoint(function.__code__.co_names)
    dispatcher = numba.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, _nrt=allocates, **options)(function)
    if CACHE:
        dispatcher._cache = _Cache(function, allocates)
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` on first use: no GIL, no Python errors, C's rules for division, cached on disk."""
    return _compiled(function)


def part(function: Callable[..., Any]) -> Any:
    """Compile as ``kernel``, for what other kernels call often: it becomes a part of their code."""
    return _compiled(function, forceinline=True, no_cpython_wrapper=True)


def report_kernel(function: Callable[..., Any]) -> Any:
    """Compile as ``kernel``, but sums may be taken in any order: for figures in reports, never for bytes that are
    written.
    """
    return _compiled(function, fastmath={"reassoc"})
