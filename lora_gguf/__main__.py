"""``python -m lora_gguf``, and the console script."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line; while it is imported, Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # imports and compilers make much that lasts: to look through it again and again takes a tenth of a second, or more
    gc.set_threshold(1_000_000)
    # work is spread over threads of ours: numpy's own would only wait, and to start them takes a twentieth of a second
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lora_gguf.cli import main

    try:
        main()
    except SystemExit as end:
        # all is written and closed: to take Numba down piece by piece would last as long as a small merge
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
