"""The command line: parse, call, print. ``main`` is the only place that catches."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lora_gguf import __version__
from lora_gguf.cli.compare import compare
from lora_gguf.cli.convert import convert
from lora_gguf.cli.doctor import doctor
from lora_gguf.cli.extract import extract
from lora_gguf.cli.fetch import fetch
from lora_gguf.cli.helping import Grouped, as_typed, asked_for_help, help_width, way_out
from lora_gguf.cli.init_pipeline import init_pipeline
from lora_gguf.cli.inspect import inspect
from lora_gguf.cli.merge import merge
from lora_gguf.cli.push import push
from lora_gguf.cli.terms import COMMAND_LINE, joined_scales, say
from lora_gguf.cli.verify import verify
from lora_gguf.errors import LoraGgufError, UsageError, printable
from lora_gguf.files.under_way import undo_all
from lora_gguf.progress import NO_BAR, is_shown

_ClickUsageError: Any = typer.BadParameter.__base__  # typer brings its own click
SHOWN = 15  # offenders of an error
# what typer's validators say -> what we say
_WORDS = {
    "Value error, ": "",
    "Input should be ": "expected ",
    ", unable to parse string as a number": "",
    ", unable to parse string as an integer": "",
}

app = typer.Typer(
    name="lora-gguf",
    help="Convert LoRA adapters to GGUF, and merge them into quantized GGUF models without losing the fine-tune.",
    epilog="lora-gguf help COMMAND tells more of each.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "terminal_width": help_width()},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lora-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error; also LORA_GGUF_DEBUG=1.")
    ] = False,
) -> None:
    if debug:
        os.environ["LORA_GGUF_DEBUG"] = "1"


# the commands in the order of their help, each in one line that an 80-column terminal holds
COMMANDS: dict[Callable[..., None], str] = {
    fetch: "Download an adapter from the Hub, or a GGUF of its base.",
    inspect: "Tell what a GGUF or an adapter is, from its header.",
    doctor: "Tell whether a merge will work, and what it will keep.",
    convert: "Turn an adapter into a GGUF for llama.cpp's --lora.",
    merge: "Add adapters to a quantized model: one standalone GGUF.",
    verify: "Check that a merged file holds its base plus adapters.",
    compare: "Ask llama.cpp with base, adapter and merged file.",
    push: "Put a merged file on the Hub, with a model card.",
    extract: "Make the adapter that turns one GGUF into another.",
    init_pipeline: "Write a Makefile for many adapters and quantizations.",
}
for command, summary in COMMANDS.items():
    app.command(cls=Grouped, short_help=summary)(command)


def main() -> None:
    """Run the console script: turn every refusal into one line on stderr and its exit code."""
    _open_standard_streams()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _leave)
    code = execute()
    _flush_or_drop_stdout()
    sys.exit(code)


def _leave(number: int, _frame: object) -> None:
    """End the process at once, and leave nothing half written.

    An exception, raised wherever the main thread stands, may be lost in a callback, or leave a lock held for ever.
    """
    undo_all()
    line = f"lora-gguf: error: {signal.Signals(number).name}: stopped, no output is half written\n"
    with contextlib.suppress(OSError):
        os.write(2, (NO_BAR * is_shown() + line).encode())
    os._exit(128 + number)


def _open_standard_streams() -> None:
    """Give what was closed by the caller a place to go: an output must never get the descriptor of stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_drop_stdout() -> None:
    """Leave nothing in the buffer for the interpreter's end, which would print a traceback where writing fails."""
    try:
        print(end="", flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def execute(arguments: list[str] | None = None) -> int:
    """Run one command line (default: the process's); its exit code. Every refusal ends here."""
    try:
        words = asked_for_help(arguments or sys.argv[1:])
        COMMAND_LINE.set(("lora-gguf", *words))
        code = app(args=joined_scales(words) or ["--help"], prog_name="lora-gguf", standalone_mode=False) or 0
        print(end="", flush=True)
        return code
    except BaseException as error:
        return _report(error)


def _report(error: BaseException) -> int:
    """Say in one line what ended the run; its exit code."""
    try:
        raise error
    except LoraGgufError as error:
        _trace()
        _complain(as_typed(error, app, COMMAND_LINE.get()) if isinstance(error, UsageError) else str(error))
        _list(error.details)
        return error.exit_code
    except _ClickUsageError as error:
        command = error.ctx.command_path if error.ctx else "lora-gguf"
        refusal = _refusal(error)
        _complain(way_out(error) or f"{refusal}{'' if refusal.endswith('?') else '.'} See '{command} --help'.")
        return 2
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        return 141
    except OSError as error:
        _trace()
        where = "the system" if error.filename is None else printable(error.filename)
        _complain(f"{where}: {error.strerror or error}: free what it lacks, or check the path, and run again")
        return 7
    except Exception as error:
        _trace()
        if isinstance(error, MemoryError) or "can't start new thread" in str(error):
            _complain("out of memory, or of threads: lower --threads")
            return 7
        _complain(f"internal error: {type(error).__name__}: {error}: please report it with --debug's traceback")
        return 1


def _list(details: Sequence[str]) -> None:
    """Print the offenders, as many as a screen holds; --debug prints all."""
    shown = len(details) if os.environ.get("LORA_GGUF_DEBUG") or len(details) <= SHOWN + 1 else SHOWN
    for detail in details[:shown]:
        say(f"  {printable(detail)}")
    if shown < len(details):
        say(f"  and {len(details) - shown} more, which lora-gguf --debug {COMMAND_LINE.get()[1]} … lists")


def _refusal(error: Any) -> str:
    """Return what is wrong with the command line, with the value that was given where typer's validator, pydantic,
    tells it.
    """
    message = error.format_message().rstrip(".")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    with contextlib.suppress(AttributeError, LookupError):
        return f"{message}, found {error.__cause__.errors()[0]['input']!r}"
    return message


def _trace() -> None:
    if os.environ.get("LORA_GGUF_DEBUG"):
        traceback.print_exc()


def _complain(line: str) -> None:
    say(f"lora-gguf: error: {printable(line, 600)}")
