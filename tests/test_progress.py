"""Bars on a real terminal, and nowhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from lora_gguf import progress
from lora_gguf.progress import WIDTH, bar, bars, by_file, shortened
from tests.common import DEMO_ADAPTER, smollm2_path
from tests.test_merge import base_and_adapter

pty = pytest.importorskip("pty")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(folder, *arguments, of_stdout=False, stopped_at=None, **environment) -> str:
    """What the command writes to its stderr, or its stdout, where that is a terminal of 120 columns.

    Once it has written ``stopped_at``, SIGINT stops it.
    """
    ours, theirs = pty.openpty()
    variables = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color", **environment}
    command, expected = [sys.executable, "-m", "lora_gguf", *map(str, arguments)], 130 if stopped_at else 0
    streams = {"stdout": theirs} if of_stdout else {"stdout": subprocess.DEVNULL, "stderr": theirs}
    process = subprocess.Popen(command, cwd=folder, env=variables, **streams)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        if not part:
            break
        said += part
        if stopped_at and stopped_at.encode() in said:
            process.send_signal(signal.SIGINT)
            stopped_at = None
    os.close(ours)
    assert process.wait(timeout=60) == expected, said
    return said.decode()


@pytest.fixture
def merging(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    return tmp_path, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--force", "--rounding", "dither"


def test_a_bar_tells_what_is_done_and_goes_away(merging):
    said = on_a_terminal(*merging)
    lines = ESCAPE.sub("", said).replace("\r", "\n").split("\n")
    assert any(re.match(r"merging blk\.\d+\.\S+\s.*━.*\d+(\.\d+)?/\d+(\.\d+)? [kMG]?B", line) for line in lines), lines
    assert "\x1b[?25h" in said and said.rindex("wrote") > said.rindex("━")  # the cursor is back, and the bar gone


def test_a_stopped_run_gives_the_cursor_back(tmp_path):
    said = on_a_terminal(
        tmp_path, "merge", smollm2_path(), DEMO_ADAPTER, "-o", tmp_path / "out.gguf", stopped_at="\x1b[?25l"
    )
    bar_gone = said[said.rindex("\x1b[?25h") :]
    assert bar_gone == "\x1b[?25hlora-gguf: error: SIGINT: stopped, no output is half written\r\n"
    assert not os.listdir(tmp_path)


def test_without_colour_where_none_is_wanted(merging):
    said = on_a_terminal(*merging, NO_COLOR="1")
    assert "merging" in said and not re.search(r"\x1b\[[0-9;]*m", said)


@pytest.mark.parametrize(
    ("options", "environment"), [(["--no-progress"], {}), (["--quiet"], {}), ([], {"TERM": "dumb"})]
)
def test_no_bar_where_none_is_wanted(merging, options, environment):
    said = on_a_terminal(*merging, *options, **environment)
    assert "\x1b" not in said and "━" not in said and ("wrote" in said) == ("--quiet" not in options)


def test_downloads_have_one_too(local_hub, tmp_path):
    files = {path.name: path.read_bytes() for path in base_and_adapter(tmp_path, "Q4_0")[:2]}
    local_hub.repos["someone/adapter"] = files
    environment = {"HF_ENDPOINT": local_hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    said = on_a_terminal(tmp_path, "fetch", "hf://someone/adapter/adapter.gguf", **environment)
    assert "fetching adapter.gguf" in ESCAPE.sub("", said)
    environment["HF_HUB_CACHE"] = str(tmp_path / "other")
    assert "━" not in on_a_terminal(tmp_path, "fetch", "hf://someone/adapter/adapter.gguf", "-q", **environment)


def test_no_bar_where_there_is_no_terminal_but_a_line_where_work_lasts(capsys, monkeypatch):
    for silent, said in ((60.0, ""), (0.05, "  merging: 30%, blk.0.attn_q.weight\n")):
        monkeypatch.setattr(progress, "SILENT", (silent, 60.0))
        with bars("merging") as (_, advance):
            advance(20, 100, "token_embd.weight")
            advance(10, 100, "blk.0.attn_q.weight")
            time.sleep(0.2)
        assert capsys.readouterr() == ("", said)
    with bar("merging", False) as advance:
        assert advance is None


def test_what_tells_nothing_yet_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENT", (0.05, 60.0))
    with bars("asking"):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "  asking: …\n")


def test_files_count_as_one_download():
    calls: list[tuple[int, int, str]] = []
    tell = by_file(lambda *call: calls.append(call))
    for call in (("a", 10, 100), ("a", 100, 100), ("b", 50, 50)):
        tell(*call)
    assert calls == [(10, 100, "a"), (90, 100, "a"), (50, 150, "b")] and by_file(None) is None


def test_long_names_keep_what_tells_them_apart():
    assert shortened("blk.10.ffn_down_exps.weight", 20) == "blk.10.ffn_down_exps"
    assert shortened("enc.blk.10.ffn_down_exps.weight", 20) == "enc.blk.1…_down_exps"
    assert shortened("model-Q4_K_M-00001-of-00003.gguf", 20) == "model-Q4_…00003.gguf"
    assert len(shortened("a" * 99, WIDTH)) == WIDTH


@pytest.mark.parametrize("columns", [30, 40, 200])
def test_tables_fit_the_terminal(merging, columns):
    folder, _, base, adapter, *_ = merging
    said = on_a_terminal(folder, "doctor", base, adapter, "-q", COLUMNS=str(columns), of_stdout=True)
    table = said.replace("\r", "").partition("\n\ntensors")[2].partition("\n\n")[0]
    assert max(map(len, table.split("\n"))) <= columns and "nearest" in table
    assert ("\n  " in table) == (columns < 80)


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_bars_fit_narrow_terminals(merging, columns):
    said = on_a_terminal(*merging, COLUMNS=str(columns))
    lines = [line for line in ESCAPE.sub("", said).replace("\r", "\n").split("\n") if "━" in line]
    assert lines and max(map(len, lines)) <= columns and any("%" in line for line in lines)


def test_something_is_shown_before_the_first_weight(merging):
    said = ESCAPE.sub("", on_a_terminal(*merging)).replace("\r", "\n")
    first = next(line for line in said.split("\n") if line.strip())
    assert re.match(r"merging +━", first), first


def test_the_first_run_says_that_it_compiles(merging, tmp_path):
    folder, *arguments = merging
    command = [sys.executable, "-m", "lora_gguf", *map(str, arguments)]
    cache = {**os.environ, "LORA_GGUF_CACHE": str(tmp_path / "cache")}
    said = [subprocess.run(command, cwd=folder, env=cache, capture_output=True, text=True).stderr for _ in range(2)]
    assert "compiles its kernels" in said[0] and "compiles" not in said[1]
