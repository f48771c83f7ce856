"""Mistakes that people make, each answered by one line that says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import lora_gguf
from lora_gguf import errors
from lora_gguf.cli import COMMANDS, app
from tests import tiny
from tests.common import smollm2_path
from tests.test_cli import run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its shards of which the second is gone, an adapter as a folder, a zip and a GGUF."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny.TINY / "llama" / "adapter", folder / "adapter")
    base = tiny.base_gguf(folder, "llama")
    lora_gguf.convert(folder / "adapter", folder / "lora.gguf", base)
    lora_gguf.merge(base, folder / "adapter", folder / "split.gguf", max_bytes=base.stat().st_size // 2)
    first, second, *_ = sorted(folder.glob("split-*.gguf"))
    second.unlink()
    shutil.make_archive(str(folder / "zipped"), "zip", folder / "adapter")
    (folder / "downloads").mkdir()
    shutil.copy(folder / "zipped.zip", folder / "downloads")
    (folder / "notes.txt").write_text("hello")
    shutil.copy(folder / "adapter" / "adapter_model.safetensors", folder / "lone.safetensors")
    return folder


SHARD = "split-00001-of-00003.gguf"
MISTAKES = {
    "the output as a third name": ("merge llama.gguf adapter out.gguf", 2, "name the output with -o out.gguf"),
    "a zip as the adapter": ("merge llama.gguf zipped.zip -o out.gguf", 7, "unpack it, and name the folder with"),
    "a folder with a zip": ("merge llama.gguf downloads -o out.gguf", 7, "unpack zipped.zip first"),
    "a mix as --type": ("merge llama.gguf adapter --type Q4_K_M", 2, "--type Q4_K for the adapted tensors"),
    "a type as --quantize": ("merge llama.gguf adapter --quantize Q4_K", 2, "name one of Q4_K_S, Q4_K_M"),
    "a scale in percent": ("merge llama.gguf adapter --scale 75%", 2, "write 0.75"),
    "a scale with a comma": ("merge llama.gguf adapter --scale 0,75", 2, "write 0.75"),
    "a share in percent": ("merge llama.gguf adapter --min-retention 95%", 2, "--min-retention 95%: expected a number: "
                           "write 0.95"),
    "a scale in percent behind a name": ("merge llama.gguf --lora adapter:75%", 2, "found '75%': write 0.75"),
    "a page that is no page": ("merge llama.gguf adapter --report page.pdf", 2, "expected a name that ends in .html"),
    "the same model twice": ("extract llama.gguf llama.gguf -o out.gguf", 5, "give the model before, then the one after"),
    "nothing of that name": ("verify nope.gguf --base llama.gguf --lora adapter", 7, "check the path"),
    "another suffix": ("inspect llama.guf", 7, "did you mean llama.gguf?"),
    "one scale for two": ("merge llama.gguf --lora adapter --lora lora.gguf --scale 0.5", 2, "--lora ADAPTER:0.5"),
    "a quoted ~ for the base": ("merge ~/llama.gguf adapter", 7, f"write {os.path.expanduser('~/llama.gguf')}"),
    "a quoted ~ for the adapter": ("merge llama.gguf ~/adapter", 7, f"write {os.path.expanduser('~/adapter')}"),
    "a typo in the base": ("merge lama.gguf adapter", 7, "did you mean llama.gguf?"),
    "a typo in the adapter": ("merge llama.gguf adaptr", 7, "did you mean adapter?"),
    "a missing shard": (f"merge {SHARD} adapter -o out.gguf", 7, "shard 2 of 3 is missing: put it beside the others"),
    "a lone shard inspected": (f"inspect {SHARD}", 7, "shard 2 of 3 is missing: put it beside the others"),
    "an adapter as the base": ("merge lora.gguf adapter -o out.gguf", 3, "name the base model first, then the adapter"),
    "an adapter's folder as the base": ("merge adapter llama.gguf", 7, "name the model first, then the adapter"),
    "a model as the adapter": ("merge llama.gguf llama.gguf -o out.gguf", 3, "give base and adapter in this order"),
    "no command": ("llama.gguf adapter", 2, "name one first, as in: lora-gguf merge"),
    "no base to look at": ("doctor", 2, "lora-gguf doctor BASE.gguf ADAPTER"),
    "no base": ("merge", 2, "lora-gguf merge BASE.gguf ADAPTER"),
    "no adapter": ("merge llama.gguf", 2, "name its folder, Hub id or GGUF after the base"),
    "no adapter to verify": ("verify llama.gguf --base llama.gguf", 2, "--lora ADAPTER[:SCALE] is missing"),
    "no base to verify": ("verify llama.gguf --lora adapter", 2, "--base BASE.gguf is missing"),
    "no tuned model": ("extract llama.gguf -o out.gguf", 2, "TUNED.gguf is missing, as in: lora-gguf extract base"),
    "convert without a base": ("convert adapter -o out.gguf", 2, "give --base BASE.gguf or --base-config DIR"),
    "an unknown command": ("mrge llama.gguf adapter", 2, "Did you mean 'merge'? See"),
    "an unknown option": ("merge llama.gguf adapter --typ Q8_0", 2, "--type"),
    "a growth without a percent sign": ("merge llama.gguf adapter --max-growth 5", 2, "such as 10%"),
    "a size without a unit": ("merge llama.gguf adapter --memory 100", 2, "such as 500M or 2G"),
    "half a shard": ("merge llama.gguf adapter --shard 3", 2, "such as 3/5"),
    "a shard too many": ("merge llama.gguf adapter --shard 3/2", 2, "there is no shard 3 of 2"),
    "a second adapter as the third name": ("merge llama.gguf adapter adapter", 2, "adapter with --lora adapter"),
    "a second adapter's GGUF": ("doctor llama.gguf adapter lora.gguf", 2, "name each further adapter with --lora"),
    "an adapter from the Hub as the third name": ("merge llama.gguf adapter user/b", 2, "with --lora user/b"),
    "the base as the second name": ("convert adapter llama.gguf -o out.gguf", 2, "name the base with --base llama.gguf"),
    "verify as merge is called": ("verify out.gguf llama.gguf adapter", 2, "as in: lora-gguf verify merged.gguf --base"),
    "a typo in a choice": ("merge llama.gguf adapter --rounding dihter", 2, "--rounding: expected one of auto, "),
    "a typo in another choice": ("convert adapter --to pfet", 2, "did you mean peft?"),
    "a typo in a type": ("merge llama.gguf adapter --type Q8", 2, "--type: 'Q8' is not known: did you mean Q8_0?"),
    "a typo in a mix as --type": ("merge llama.gguf adapter --type Q4_KM", 2, "--quantize Q4_K_M for all"),
    "a typo in a mix": ("merge llama.gguf adapter --quantize Q4KM", 2, "--quantize: 'Q4KM' is not known: did you mean"),
    "a word as a rank": ("extract llama.gguf llama.gguf --rank x -o out.gguf", 2, "--rank: expected a whole number from 1, or auto"),
    "a text as the adapter": ("merge llama.gguf notes.txt -o out.gguf", 7, "notes.txt: not an adapter: name its folder"),
    "weights without their config": ("merge llama.gguf lone.safetensors -o out.gguf", 7,
                                     "lone.safetensors: expected adapter_config.json beside it"),
    "a text as the base": ("merge notes.txt adapter -o out.gguf", 3, "to start with GGUF, found hell: check the path"),
    "another format's name for the output": ("merge llama.gguf adapter -o out.safetensors", 2, "call it out.gguf"),
    "a folder that is not there": ("merge llama.gguf adapter -o no/out.gguf", 7, "make it first"),
    "an output that exists": ("merge llama.gguf adapter -o lora.gguf", 7, "replace it with --force"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(files, capsys, monkeypatch, mistake):
    monkeypatch.chdir(files)
    words, code, way = MISTAKES[mistake]
    found, out, err = run(capsys, *words.split())
    assert (found, out, err.count("\n")) == (code, "", 1) and way in err, err
    assert not (files / "out.gguf").exists()


def test_a_repository_without_ggufs_is_told_where_they_are(local_hub, files, capsys):
    local_hub.repos["lab/Tiny"] = {"config.json": b"{}", "model.safetensors": b"x"}
    code, _, err = run(capsys, "merge", "lab/Tiny", files / "adapter", "-o", files / "out.gguf")
    assert code == errors.HubError.exit_code and "lora-gguf fetch ADAPTER --base" in err and "Q4_K_M" in err


def test_a_quantization_that_is_not_there_and_which_is_the_default(gguf_hub, files, capsys):
    code, _, err = run(capsys, "merge", "maker/Tiny-1B-GGUF:Q5_K_M", files / "adapter", "-o", files / "out.gguf")
    assert (
        code == errors.UsageError.exit_code and "choose one of Q4_K_M" in err and "where none is named, Q4_K_M" in err
    )


@pytest.mark.parametrize("words", [["help"], ["help", "merge"], ["merge", "-h"]])
def test_help_is_where_people_look(capsys, words):
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.startswith("Usage: lora-gguf" + (" merge" if "merge" in words else ""))


def test_help_fits_a_narrow_terminal():
    for command in COMMANDS:
        words = [sys.executable, "-m", "lora_gguf", "help", command.__name__.replace("_", "-")]
        said = subprocess.run(words, env={**os.environ, "COLUMNS": "40"}, capture_output=True, text=True, check=True)
        lines = [line for line in said.stdout.splitlines() if not line.startswith("  -")]  # a name is not broken
        assert max(map(len, lines)) <= 40


def test_the_version_by_a_letter(capsys):
    assert run(capsys, "-V") == run(capsys, "--version") == (0, f"lora-gguf {lora_gguf.__version__}\n", "")


def test_options_stand_in_groups(capsys):
    _, out, _ = run(capsys, "help", "merge")
    heads = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == [f"{name}:" for name in ("Arguments", "Input", "Output", "Quality", "Types", "Split and parallel",
                                             "Report", "Rare", "Help")]  # fmt: skip
    assert out.index("--expert-b-layout") > out.index("Rare:") > out.index("--rounding") > out.index("Quality:")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("merge --type Q8", ["Q8_0"]),
        ("merge --quantize Q4_K", ["Q4_K_S", "Q4_K_M"]),
        ("merge --rounding d", ["dither"]),
        ("merge ll", ["llama.gguf"]),
        ("merge llama.gguf ada", ["adapter" + os.sep]),
        ("merge llama.gguf --lora lor", ["lora.gguf"]),
        ("verify ll", ["llama.gguf"]),
    ],
)
def test_what_completes(files, monkeypatch, words, offered):
    monkeypatch.chdir(files)
    asked = {
        "_LORA_GGUF_COMPLETE": "complete_bash",
        "COMP_WORDS": f"lora-gguf {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    found = CliRunner().invoke(app, env=asked, prog_name="lora-gguf").stdout.split()
    assert found == offered


def test_a_merge_ends_with_whether_it_is_good_how_to_run_and_how_to_check(files, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    code, table, err = run(capsys, "merge", files / "llama.gguf", files / "adapter", "-o", out, "--modelfile")
    assert code == 0 and table.split("\n")[0].split() == ["tensors", "type", "count", "kept"]
    said = err.splitlines()
    assert said[0] == "100% of the fine-tune is kept, less than 1% of its effect lost: good"
    assert f"run it:   llama-cli -m {out}" in said and any("ollama create" in line for line in said)
    check = next(line for line in said if line.startswith("check it: lora-gguf ")).partition("lora-gguf ")[2]
    assert run(capsys, *check.split())[0] == 0


def test_quiet_prints_the_path_alone_and_verbose_all_that_was_measured(files, tmp_path, capsys):
    out, merge = tmp_path / "out.gguf", ["merge", files / "llama.gguf", files / "adapter", "--force", "-o"]
    assert run(capsys, *merge, out, "-q") == (0, f"{out}\n", "")
    _, table, _ = run(capsys, *merge, out, "--verbose")
    assert "noise/delta" in table and "codes changed" in table
    adapter = tmp_path / "lora.gguf"
    assert run(capsys, "convert", files / "adapter", "--base", files / "llama.gguf", "-o", adapter, "-q") == (
        0,
        f"{adapter}\n",
        "",
    )


def test_json_says_what_was_read_and_written_and_by_what(files, tmp_path, capsys):
    out, base = tmp_path / "out.gguf", files / "llama.gguf"
    _, text, _ = run(capsys, "merge", base, files / "adapter", "-o", out, "--json", "--seed", "7")
    report = json.loads(text)
    assert report["outputs"] == [{"path": str(out), "size": out.stat().st_size}]
    assert report["inputs"][0] == {"role": "base", "path": str(base), "size": base.stat().st_size}
    assert report["inputs"][1]["role"] == "adapter" and report["seed"] == 7
    assert report["versions"]["lora-gguf"] == lora_gguf.__version__ and report["verdict"].endswith(": good")


@pytest.mark.parametrize(("rounding", "size", "word"), [("auto", 2e-3, "good"), ("nearest", 2e-5, "poor")])
def test_the_sentence_says_whether_it_is_good(tmp_path, capsys, rounding, size, word):
    from tests.test_merge import base_and_adapter

    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", size=size)
    _, _, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--rounding", rounding)
    told = next(line for line in err.splitlines() if "of the fine-tune is kept" in line)
    assert word in told
    advice = [line for line in err.splitlines() if re.search("--(type|rounding) ", line)]
    assert len(advice) == (word == "poor") and told not in advice  # one, that of the warning
    assert ("check it: " in err) == (word == "good")  # of a file that nothing can prove no proof is promised


def test_many_offenders_are_shown_as_many_as_a_screen_holds(files, tmp_path, capsys):
    code, _, err = run(capsys, "extract", smollm2_path(), files / "llama.gguf", "-o", tmp_path / "out.gguf")
    assert code == errors.MismatchError.exit_code and err.count("\n") == 17
    assert re.search(r"and \d+ more, which lora-gguf --debug extract … lists$", err.rstrip())
