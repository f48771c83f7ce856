"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lora_gguf import errors
from lora_gguf.cli import execute
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.output import SUFFIX
from tests.common import gemma3_path, smollm2_path
from tests.test_merge import NAME, base_and_adapter, tensor


def run(capsys, *arguments):
    code = execute([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.endswith(SUFFIX)]


def test_merge_prints_the_table_and_writes_the_file(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    code, out, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--rounding", "dither")
    assert code == 0 and "ffn_up" in out and "noise" not in out and "wrote" in err
    assert (tmp_path / "out.gguf").stat().st_size > base.stat().st_size


def test_json_is_json_and_nothing_else(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--json")
    report = json.loads(out)
    assert code == 0 and report["merged"][0]["name"] == NAME and 0.5 < report["all"]["kept"] < 1.5


def test_dry_run(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--dry-run")
    assert "would be applied" in out
    assert code == 0 and "ffn_up" in out and "kept" not in out and sorted(os.listdir(tmp_path)) == before
    assert err.startswith("nothing was written: the tensors would take ")


def test_min_retention_is_an_error_before_the_rename(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", size=2e-5)
    (tmp_path / "out.gguf").write_bytes(b"old")
    code, _, err = run(
        capsys,
        "merge",
        base,
        adapter,
        "-o",
        tmp_path / "out.gguf",
        "--rounding",
        "nearest",
        "--min-retention",
        "0.5",
        "--force",
    )
    assert code == errors.NumericError.exit_code and "--type Q8_0 would keep about 1.0" in err
    assert (tmp_path / "out.gguf").read_bytes() == b"old" and not leftovers(tmp_path)


def test_little_kept_is_warned_about(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", size=2e-5)
    code, _, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--rounding", "nearest")
    assert code == 0 and "warning: only 0.0" in err and "--type Q8_0 would keep about 1.0" in err


def _missing(tmp):
    return [tmp / "no.gguf", tmp / "adapter.gguf"], 7


def _not_a_gguf(tmp):
    (tmp / "base.gguf").write_bytes(b"<html>not found</html>")
    return [tmp / "base.gguf", tmp / "adapter.gguf"], 3


def _truncated(tmp):
    raw = (tmp / "base.gguf").read_bytes()
    (tmp / "base.gguf").write_bytes(raw[:-40])
    return [tmp / "base.gguf", tmp / "adapter.gguf"], 3


def _swapped(tmp):
    return [tmp / "adapter.gguf", tmp / "base.gguf"], (3, 5)


def _missing_adapter(tmp):
    return [tmp / "base.gguf", tmp / "nowhere"], 7


def _directory_as_base(tmp):
    return [tmp, tmp / "adapter.gguf"], 7


def _existing_output(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "-o", tmp / "base.gguf"], 7


def _output_in_missing_folder(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "-o", tmp / "no" / "out.gguf"], 7


def _infinite_scale(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "--scale", "inf"], 2


def _unknown_option(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "--scle", "1"], 2


def _unknown_rounding(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "--rounding", "up"], 2


def _unknown_type(tmp):
    return [tmp / "base.gguf", tmp / "adapter.gguf", "--type", "Q4_Z"], 2


REFUSALS = [
    _missing, _not_a_gguf, _truncated, _swapped, _missing_adapter, _directory_as_base, _existing_output,
    _output_in_missing_folder, _infinite_scale, _unknown_option, _unknown_rounding, _unknown_type,
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_one_line_one_code_and_nothing_written(tmp_path, capsys, monkeypatch, case):
    base_and_adapter(tmp_path, "Q4_0")
    monkeypatch.chdir(tmp_path)
    arguments, expected = case(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    code, out, err = run(capsys, "merge", *arguments)
    assert code in (expected if isinstance(expected, tuple) else (expected,)), err
    assert err.startswith("lora-gguf: error: ") and err.count("\n") == 1 and not out
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_typo_is_answered_with_the_right_word(capsys):
    code, _, err = run(capsys, "mrge")
    assert code == 2 and "merge" in err and err.count("\n") == 1


@pytest.mark.campaign("adapters that do not fit")
def test_wrong_base(tmp_path, capsys):
    from tests.common import DEMO_ADAPTER

    code, out, err = run(capsys, "merge", gemma3_path(), DEMO_ADAPTER, "-o", tmp_path / "out.gguf")
    assert (
        code == errors.MismatchError.exit_code and "base" in err and err.count("\n") == 1 and not os.listdir(tmp_path)
    )


def test_control_characters_never_reach_the_terminal(tmp_path, capsys):
    code, _, err = run(capsys, "merge", tmp_path / "a\x1b[2J.gguf", tmp_path / "b")
    assert code == 7 and "\x1b" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing(tmp_path, number, code):
    from tests.common import DEMO_ADAPTER

    command = [
        sys.executable,
        "-m",
        "lora_gguf",
        "merge",
        smollm2_path(),
        DEMO_ADAPTER,
        "-o",
        tmp_path / "out.gguf",
        "--type",
        "Q4_K",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not leftovers(tmp_path) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert not os.listdir(tmp_path) and "half written" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "base.gguf", "adapter.gguf"],
        ["-m", "base.gguf", "--lora", "adapter.gguf"],
        ["base.gguf", "--lora", "adapter.gguf"],
        ["--model", "base.gguf", "--lora-scaled", "adapter.gguf:1.0", "-t", "1"],
        ["-m", "base.gguf", "--lora-scaled", "adapter.gguf", "1.0"],
        ["base.gguf", "--lora-scaled", "adapter.gguf:0.25,adapter.gguf:0.75"],
        ["base.gguf", "--lora-scaled", "adapter.gguf", "1.5", "--lora-scaled", "adapter.gguf", "-.5"],
    ],
)
def test_as_llama_cpp_users_type_it(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    base_and_adapter(tmp_path, "F32")
    assert run(capsys, "merge", "base.gguf", "adapter.gguf", "-o", "plain.gguf")[0] == 0
    code, _, err = run(capsys, "merge", *arguments, "--output", "aliased.gguf")
    assert code == 0, err
    plain, aliased = (tensor(tmp_path / f"{name}.gguf", NAME).view("<f4") for name in ("plain", "aliased"))
    assert abs(plain - aliased).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no base model"),
        (["base.gguf"], "no adapter"),
        (["-m", "base.gguf"], "no adapter"),
        (["base.gguf", "adapter.gguf", "-m", "base.gguf"], "two base models"),
        (["base.gguf", "adapter.gguf", "-o", "nowhere/"], "the folder does not exist"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    base_and_adapter(tmp_path, "Q4_0")
    code, out, err = run(capsys, "merge", *arguments)
    assert code in (2, 7) and says in err and err.count("\n") == 1 and not out
    assert sorted(os.listdir(tmp_path)) == ["adapter.gguf", "base.gguf"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("adapter_config.json", "found an adapter's folder: name the model first"),
        ("config.json", "found a Hugging Face model's folder: make a GGUF of it"),
        ("one.gguf", "found a folder: name a file in it, such as one.gguf"),
        ("model.safetensors", "found a folder: name a file\n"),
    ],
)
def test_what_is_no_gguf_is_named(tmp_path, capsys, content, says):
    _, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / content).write_bytes(b"{}")
    code, _, err = run(capsys, "merge", folder, adapter, "-o", tmp_path / "out.gguf")
    assert code == 7 and says in err and err.count("\n") == 1


def test_safetensors_are_no_base(tmp_path, capsys):
    _, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    code, _, err = run(capsys, "merge", tmp_path / "model.safetensors", adapter, "-o", tmp_path / "out.gguf")
    assert code == 3 and "found safetensors: make a GGUF of it" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scale", "abc"], "Invalid value for '--scale': expected a valid number, found 'abc'."),
        (["--seed", "1.5"], "Invalid value for '--seed': expected a valid integer, found '1.5'."),
        (["-t", "0"], "Invalid value for '-t' / '--threads': expected greater than or equal to 1, found '0'."),
        (["--lora", "adapter.gguf:abc"], "--lora adapter.gguf:abc: expected a number as its scale, found 'abc'"),
    ],
)
def test_what_was_given_is_quoted(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    base_and_adapter(tmp_path, "Q4_0")
    code, _, err = run(capsys, "merge", "base.gguf", "adapter.gguf", *options)
    assert code == 2 and says in err and err.count("\n") == 1


def test_verify_ends_with_a_verdict(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf")
    code, _, err = run(capsys, "verify", tmp_path / "out.gguf", "--base", base, "--lora", adapter)
    assert code == 0 and "out.gguf is right" in err


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_completion_in_bash(tmp_path):
    """The script that --show-completion prints, run by bash."""
    command = tmp_path / "lora-gguf"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_gguf "$@"\n')
    command.chmod(0o755)
    script = """
        source <(lora-gguf --show-completion bash)
        try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _lora_gguf_completion lora-gguf; echo "${COMPREPLY[*]}"; }
        try lora-gguf me; try lora-gguf merge --rounding n
    """
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["merge", "nearest", ""], done.stderr


def test_the_list_of_commands_fits_a_terminal(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "..." not in out.partition("Commands:")[2] and max(map(len, out.splitlines())) <= 80


def test_the_file_that_was_meant(tmp_path, capsys):
    base_and_adapter(tmp_path, "Q4_0")
    code, _, err = run(capsys, "merge", tmp_path / "bse.gguf", tmp_path / "adapter.gguf", "-o", tmp_path / "out.gguf")
    assert code == errors.FileError.exit_code and f"did you mean {tmp_path / 'base.gguf'}?" in err


@pytest.mark.parametrize("growth", ["5", "x", "-1%", "2000%", "nan"])
def test_a_growth_that_could_be_misread_is_refused(tmp_path, capsys, growth):
    base_and_adapter(tmp_path, "Q4_0")
    code, _, err = run(
        capsys, "merge", tmp_path / "base.gguf", tmp_path / "adapter.gguf", "-o", tmp_path / "o", "--max-growth", growth
    )
    assert code == errors.UsageError.exit_code and "such as 10%" in err and not (tmp_path / "o").exists()


def test_a_traceback_only_with_debug(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORA_GGUF_DEBUG", "")
    for arguments, wanted in ((("merge",), False), (("--debug", "merge"), True)):
        code, _, err = run(capsys, *arguments, tmp_path / "none.gguf", "x")
        assert code == 7 and ("Traceback" in err) is wanted and err.count("lora-gguf: error: ") == 1


@pytest.mark.parametrize("command", ["merge", "doctor"])
def test_scale_is_the_first_adapters(tmp_path, capsys, command):
    base, adapter, _ = base_and_adapter(tmp_path, "F32")
    output = ["-o", tmp_path / "out.gguf"] if command == "merge" else []
    code, _, err = run(capsys, command, base, "--lora", adapter, "--lora", adapter, "--scale", "0.5", *output)
    assert code == 2 and "--scale 0.5 is ADAPTER's" in err and "--lora ADAPTER:0.5" in err
    assert run(capsys, command, base, adapter, "--scale", "0.5", "--lora", f"{adapter}:2", *output)[0] == 0
    if command == "merge":
        with GgufReader(tmp_path / "out.gguf") as reader:
            assert reader.get("lora_gguf.adapter.scales") == [0.5, 2.0]
