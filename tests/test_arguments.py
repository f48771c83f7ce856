"""Wrong values, in the library and on the command line: a ``UsageError`` in one line, before anything is read or made."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import lora_gguf
from lora_gguf.adapters.adapter_file import AdapterFile
from lora_gguf.errors import UsageError
from lora_gguf.mapping.reading import Reading
from lora_gguf.merging.options import Policy, Resources, Writing
from tests.common import ROOT
from tests.test_merge import base_and_adapter

NAN, NUL = float("nan"), "a\0b"
READING = [
    ("tied", "seperate"), ("tied", None), ("tied", 1), ("expert_b_layout", "expert_major"), ("expert_b_layout", ""),
    ("allow_unused", "("), ("allow_unused", 3), ("base_config", NUL), ("base_config", 3),
]  # fmt: skip
# what is wrong in each function, a row at a time: the argument and a value
WRONG = {
    "merge": [
        *READING, ("base", None), ("base", NUL), ("base", b"base.gguf"), ("adapters", None), ("adapters", []), ("adapters", NUL),
        ("adapters", [None]), ("adapters", 5), ("adapters", [("a", "1")]), ("adapters", [("a", NAN)]), ("adapters", [("a", True)]),
        ("out", NUL), ("out", 3), ("rounding", "nearst"), ("rounding", None), ("seed", -1), ("seed", 2**64), ("seed", 1.0),
        ("type", "Q9_9"), ("type", 8), ("quantize", "Q4_K_XXL"), ("quantize", 4), ("imatrix", NUL), ("imatrix", 3),
        ("max_growth", NAN), ("max_growth", -0.1), ("max_growth", "much"), ("max_growth", None), ("max_growth", 10),
        ("min_retention", NAN), ("min_retention", -1), ("min_retention", "0.9"), ("min_retention", float("inf")),
        ("max_bytes", -1), ("max_bytes", 0), ("max_bytes", 1e9), ("keep_split", "no"), ("modelfile", "false"), ("force", "no"),
        ("shard", "0/3"), ("shard", "4/3"), ("shard", 2), ("shard", "1/2/3"), ("shard", ""), ("memory", -5), ("memory", 0),
        ("memory", 1.5), ("memory", "500M"), ("threads", 0), ("threads", -1), ("threads", 1.5), ("threads", True), ("threads", "2"),
    ],
    "verify": [*READING[3:], ("merged", None), ("merged", NUL), ("base", NUL), ("adapters", []), ("imatrix", 3), ("threads", 0)],
    "doctor": [*READING, ("base", None), ("base", NUL), ("adapters", None), ("adapters", NUL), ("threads", 1.5)],
    "convert": [
        *READING[3:], ("adapter", None), ("adapter", NUL), ("out", NUL), ("out", None), ("base", NUL), ("base", 3), ("rank", -1),
        ("rank", 0), ("rank", 1.5), ("outtype", "q4_k"), ("outtype", None), ("force", 1),
    ],
    "extract": [
        ("base", None), ("tuned", NUL), ("out", NUL), ("rank", -1), ("rank", 0), ("rank", None), ("rank", 2.0), ("outtype", "F16"),
        ("force", "no"),
    ],
    "fetch": [("adapter", None), ("adapter", NUL), ("revision", 3), ("revision", NUL), ("subfolder", 3), ("output", NUL), ("force", 2)],
    "inspect": [("source", None), ("source", NUL), ("source", 3)],
    "bases": [("adapter", NUL), ("subfolder", NUL)],
    "fetch_base": [("adapter", None), ("quant", 4), ("output", NUL)],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [(name, *entry) for name, entries in WRONG.items() for entry in entries], ids=repr)
def test_wrong_values_are_refused_in_one_line(tmp_path, local_hub, wrong):
    name, argument, value = wrong
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    out = tmp_path / "out.gguf"
    right = {
        "merge": {"base": base, "adapters": adapter, "out": out},
        "verify": {"merged": base, "base": base, "adapters": adapter},
        "doctor": {"base": base, "adapters": adapter},
        "convert": {"adapter": adapter, "out": out, "base": base},
        "extract": {"base": base, "tuned": base, "out": out},
        "inspect": {"source": base},
    }.get(name, {"adapter": "someone/adapter"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        getattr(lora_gguf, name)(**right | {argument: value})
    line = str(caught.value)
    assert len(line) < 400 and line.isprintable()
    names = ("adapter", "scale") if argument == "adapters" else (argument.replace("_", "-"), argument)
    assert any(name in line for name in names)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_values_that_are_allowed_are_named():
    for make, names in (
        (lambda: Reading(tied="seperate"), ("separate", "shared", "refuse", "'seperate'")),
        (lambda: Reading(expert_b_layout="x"), ("rank-major", "expert-major")),
        (lambda: Policy("nearst"), ("auto", "dither", "nearest", "fresh")),
        (lambda: Policy(type="banana"), ("Q8_0", "BF16", "'banana'")),
        (lambda: AdapterFile("a.gguf", "f8"), ("f32", "f16", "bf16", "q8_0")),
        (lambda: Resources(0), ("from 1", "found 0")),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: Reading(tied="seperate"), "separate"),
        (lambda: Reading(expert_b_layout="expert major"), "expert-major"),
        (lambda: Policy("nearst"), "nearest"),
        (lambda: Policy("Dihter"), "dither"),
        (lambda: Policy(type="q8"), "Q8_0"),
        (lambda: Policy(type="IQ4NL"), "IQ4_NL"),
        (lambda: Policy(mix="Q4_KM"), "Q4_K_M"),
        (lambda: Policy(mix="iq3-xxs"), "IQ3_XXS"),
        (lambda: AdapterFile("a.gguf", "fp16"), "f16"),
    ],
)
def test_of_every_choice_the_name_that_was_meant_is_told(make, meant):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value).endswith(f": did you mean {meant}?")


@pytest.mark.parametrize("mix", ["Q4_KM", "q5_k_s", "IQ2_M", "Q3_K_L"])
def test_a_mix_is_no_type(mix):
    with pytest.raises(UsageError, match=r"a mix of types, not a type: .*--quantize (Q4_K_M|Q5_K_S|IQ2_M|Q3_K_L) "):
        Policy(type=mix)


@pytest.mark.parametrize("make", [Writing, AdapterFile])
def test_an_output_whose_name_says_another_format_is_refused(make, tmp_path):
    with pytest.raises(UsageError, match=r"merged\.v2\.safetensors: a GGUF is written: call it .*merged\.v2\.gguf$"):
        make(tmp_path / "merged.v2.safetensors")
    for name in ("merged.gguf", "merged", "merged.Q8_0", "v1.2"):
        make(tmp_path / name)


def test_right_values_are_taken():
    assert Resources(np.int64(2), 1 << 30).threads == 2 and Writing("out.gguf", shard="3/5").part == (3, 5)
    assert Policy(seed=2**64 - 1, min_retention=np.float32(0.5), max_growth=1).min_retention == 0.5
    assert Reading("shared", "^stray", "expert-major").tied == "shared"


def test_what_is_wrong_is_told_before_anything_is_downloaded(tmp_path, local_hub):
    with pytest.raises(UsageError, match="type"):
        lora_gguf.merge("someone/base:Q4_0", "someone/adapter", tmp_path / "out.gguf", type="Q9")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(lora_gguf.FileError, match="exists already"):
        lora_gguf.merge("someone/base:Q4_0", "someone/adapter", tmp_path / "there.gguf")
    assert not local_hub.n_sent


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "lora_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    "option",
    ["--min-retention=nan", "--min-retention=inf", "--min-retention=-1", "--scale=nan", "--scale=inf", "--max-growth=nan"]
    + ["--max-growth=nan%", "--max-growth=inf%", "--lora=adapter.gguf:nan", "--memory=nan", "--split-max-size=inf", "--seed=nan"],
)  # fmt: skip
def test_numbers_that_are_none(tmp_path, option):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    option = option.replace("=adapter.gguf", f"={adapter}")
    done = run("merge", base, adapter, "-o", tmp_path / "out.gguf", option)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", ["0", "abc", "-1", "1.5", " ", "99999999999999999999"])
def test_a_number_of_threads_that_is_none_is_ignored(tmp_path, value):
    """Numba ends with a traceback where it is imported with one."""
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    done = run("merge", base, adapter, "-o", tmp_path / "out.gguf", "-q", NUMBA_NUM_THREADS=value, NUMBA_OPT="abc")
    assert done.returncode == 0 and not done.stderr, done.stderr
