"""``python -m lora_gguf``, and the console script."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; while it is imported, Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lora_gguf.cli import main

    main()


if __name__ == "__main__":
    main()
