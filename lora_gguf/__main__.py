"""``python -m lora_gguf``, and the console script."""

from __future__ import annotations

import gc
import signal


def main() -> None:
    """Run the command line; while it is imported, Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(100_000)  # imports make much that lasts: to look through it again and again takes a tenth of a second
    from lora_gguf.cli import main

    main()


if __name__ == "__main__":
    main()
