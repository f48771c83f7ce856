"""Kernels that see their arrays block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel

U8, U16, U64, I8, F32 = np.uint8, np.uint16, np.uint64, np.int8, np.float32


def by_block(*views: Any) -> Callable[..., Callable[..., None]]:
    """Decorate a kernel: each C-contiguous array comes to it as (n_blocks, *shape) of the dtype given here.

    Python reshapes, as Numba would take longer to compile that than the kernel. And as the shapes so come from outside,
    LLVM does not unroll a loop over them before its vectoriser sees it, which it does with a literal count.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        compiled = functools.cache(lambda: kernel(function))  # few of all the types are met in a run

        @functools.wraps(function)
        def over_blocks(*arrays: np.ndarray) -> None:
            compiled()(
                *(
                    a.reshape(-1).view(dtype).reshape(-1, *shape)
                    for a, (dtype, *shape) in zip(arrays, views, strict=False)
                )
            )

        return over_blocks

    return decorate
