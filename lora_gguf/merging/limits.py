"""What the system lets a process take, asked before threads start: code in C that gets no memory aborts."""

from __future__ import annotations

import contextlib
import os

from lora_gguf.errors import FileError
from lora_gguf.text import size_text

THREAD_BYTES = 80 << 20  # of addresses: a stack, malloc's arena, what is in work
KERNEL_BYTES = 80 << 20  # to load the compiled code


def check_address_space(n_threads: int) -> None:
    """Raise ``FileError`` where ``ulimit -v`` leaves too few addresses for ``n_threads`` threads."""
    left = addresses_left()
    if left is None or left >= KERNEL_BYTES + n_threads * THREAD_BYTES:
        return
    fitting = (left - KERNEL_BYTES) // THREAD_BYTES
    way_out = f"use --threads {fitting}" if fitting > 0 else "raise it"
    raise FileError(
        f"out of memory: ulimit -v leaves {size_text(max(left, 0))}, which is too little for {n_threads} threads: "
        f"{way_out}"
    )


def addresses_left() -> int | None:
    """Return how many bytes of addresses the process may still take; None where nothing limits them, or tells."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", "rb") as file:
                return limit - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return None
