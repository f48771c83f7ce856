"""The one decorator of all Numba kernels, and where their machine code is cached.

Kernels compile on first use and are cached in ``$XDG_CACHE_HOME/lora-gguf/kernels-<digest>`` (``LORA_GGUF_CACHE`` names
another folder). Numba notices an edit of a kernel's own file; the digest covers the files whose functions other files'
kernels call. Without a writable folder kernels compile anew in each process.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba

CALLED_BY_OTHERS = [Path(__file__).parent / name for name in ("quants/half.py", "refit.py")]


def _digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for path in CALLED_BY_OTHERS:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path | None:
    """The folder of the compiled kernels, made if need be; None where it cannot be written."""
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


def kernel(function):
    """Compile ``function`` on first use: no GIL, no Python errors, C's rules for division, cached on disk."""
    return numba.njit(cache=CACHE is not None, nogil=True, error_model="numpy")(function)


def report_kernel(function):
    """As ``kernel``, but sums may be taken in any order: for figures in reports, never for bytes that are written."""
    return numba.njit(cache=CACHE is not None, nogil=True, error_model="numpy", fastmath={"reassoc"})(function)
