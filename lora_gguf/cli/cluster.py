"""The cluster that a command gives its work to: Dask's, by the address of its scheduler."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_gguf.cli.terms import say
from lora_gguf.errors import ExecutorError, not_installed, printable

if TYPE_CHECKING:
    from concurrent.futures import Executor

ANSWERS = 5  # seconds in which a scheduler answers
LEAVES = 2  # in which it lets a client go
TALK = ("distributed", "tornado", "asyncio")  # that speak for themselves on stderr


@contextlib.contextmanager
def executor_at(address: str | None) -> Iterator[Executor | None]:
    """Yield the executor of the Dask cluster whose scheduler is at ``address``; None for None.

    Raises ``UnsupportedError`` where Dask is not installed, ``ExecutorError`` where no scheduler answers.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise not_installed("--dask", "distributed", "Dask's client and workers") from None
    shown = printable(address)
    warnings.filterwarnings("ignore", module="distributed")
    for name in [*TALK, *logging.root.manager.loggerDict]:
        if name.startswith(TALK):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        client = Client(address, timeout=ANSWERS, set_as_default=False)
    except Exception as error:
        reason = printable(error, 120) or type(error).__name__
        raise ExecutorError(
            f"--dask {shown}: no scheduler answers there ({reason}): start one with 'dask scheduler', and give the "
            "address that it prints, such as tcp://host:8786"
        ) from error
    try:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            say(f"--dask {shown}: no worker yet: the merge waits for one (dask worker {shown})")
        yield client.get_executor(pure=False)
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=LEAVES)
