"""What lies at the output's path, or is an input, is never lost: by the command line, in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import key_value, raw_key_values
from lora_gguf.files.output import SUFFIX
from tests.common import DEMO_ADAPTER, ROOT, pack_gguf, pack_kv, pack_string, smollm2_path, text_kv, u32_kv
from tests.contract import Corruption, check_preserved, check_refusal
from tests.faulty import OLD
from tests.forked import Result, snapshot
from tests.ggml_judge import Judge
from tests.gguf_corpus import ARRAY, SCALAR_VALUES, STRING, array
from tests.mounts import mounted

pytestmark = pytest.mark.campaign("preservation cases")


def _link(name, to):
    return lambda folder: (folder / name).symlink_to(to)


def _hard(folder):
    os.link(folder / "llama.gguf", folder / "h.gguf")


def _inside_link(folder):
    (folder / "sub").symlink_to(".")


def _fifo(folder):
    os.mkfifo(folder / "out")


def _nothing(folder):
    return None


# what is prepared, the output's name
REFUSED = {
    "the base itself": (_nothing, "llama.gguf"),
    "the base by ./": (_nothing, "./llama.gguf"),
    "the base by ..": (_nothing, "peft/../llama.gguf"),
    "the base by its absolute path": (_nothing, "{folder}/llama.gguf"),
    "the base by a doubled slash": (_nothing, "{folder}//llama.gguf"),
    "a symbolic link to the base": (_link("s.gguf", "llama.gguf"), "s.gguf"),
    "a link to a link to the base": (
        lambda folder: (_link("s.gguf", "llama.gguf")(folder), _link("t", "s.gguf")(folder)),
        "t",
    ),
    "a hard link of the base": (_hard, "h.gguf"),
    "the base in a folder that is a link": (_inside_link, "sub/llama.gguf"),
    "the adapter's weights": (_nothing, "peft/adapter_model.safetensors"),
    "the adapter's configuration": (_nothing, "peft/adapter_config.json"),
    "a link to the adapter's weights": (_link("w", "peft/adapter_model.safetensors"), "w"),
    "a fifo": (_fifo, "out"),
    "a device": (_nothing, "/dev/null"),
    "a link to a device": (_link("out", "/dev/full"), "out"),
    "a link to nowhere": (_link("out", "nowhere"), "out"),
    "a link to itself": (_link("out", "out"), "out"),
    "a folder that is not there": (_nothing, "none/out.gguf"),
    "a file as a folder": (_nothing, "llama.gguf/out.gguf"),
    "a file of /proc": (_nothing, "/proc/self/mem"),
    "a name of 300 bytes": (_nothing, "x" * 300),
}


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_are_refused(case, name):
    make, out = REFUSED[name]
    case.reset()
    make(case.folder)
    before = snapshot(case.folder)
    arguments = ("llama.gguf", "peft", "-o", out.format(folder=case.folder), "--force")
    check_refusal(case.forge.run("merge", *arguments, cwd=case.folder), {7})
    check_preserved(case.folder, before)


def test_an_existing_output_without_force(case):
    case.reset()
    result = case.forge.run("merge", "llama.gguf", "peft", "-o", "out.gguf", cwd=case.folder)
    check_refusal(result, {7})
    assert "--force" in result.err
    check_preserved(case.folder, case.before)


def test_an_imatrix_and_a_configuration_are_inputs(case):
    case.reset()
    (case.folder / "im.gguf").write_bytes(_imatrix(case.folder / "llama.gguf"))
    before = snapshot(case.folder)
    check_refusal(
        case.forge.run(
            "merge", "llama.gguf", "peft", "--imatrix", "im.gguf", "-o", "im.gguf", "--force", cwd=case.folder
        ),
        {7},
    )
    shutil.copy("fixtures/tiny/llama/config.json", case.folder / "config.json")
    before["config.json"] = (case.folder / "config.json").read_bytes()
    check_refusal(
        case.forge.run(
            "convert", "peft", "--base-config", "config.json", "-o", "config.json", "--force", cwd=case.folder
        ),
        {7},
    )
    check_preserved(case.folder, before)


def _imatrix(base) -> bytes:
    with GgufReader(base) as reader:
        info = next(info for info in reader.tensors.values() if "ffn_up" in info.name)
    sums = np.ones((1, info.n_cols), np.float32)
    infos = [
        (f"{info.name}.in_sum2", "F32", sums.shape, sums.tobytes()),
        (f"{info.name}.counts", "F32", (1, 1), sums[0, :1].tobytes()),
    ]
    return pack_gguf([text_kv("general.type", "imatrix")], infos)


def test_a_link_to_a_file_is_written_through_and_stays_a_link(case):
    case.reset()
    (case.folder / "target").write_bytes(OLD)
    (case.folder / "out").symlink_to("target")
    result = case.forge.run("merge", "llama.gguf", "peft", "-o", "out", "--force", "-t", "1", cwd=case.folder)
    assert result.code == 0 and (case.folder / "out").is_symlink()
    assert (case.folder / "target").read_bytes() == case.whole["out.gguf"]


TOLD = ["wrote", "run", "check"]  # after what was kept


@pytest.mark.parametrize("name", ["x" * 255, "å" * 127, "日" * 85, "-out.gguf", "out put\n.gguf", "\udcff.gguf"])
def test_odd_names(case, name):
    case.reset()
    result = case.forge.run("merge", "llama.gguf", "peft", f"--output=./{name}", "-t", "1", cwd=case.folder)
    assert result.code == 0 and (case.folder / name).read_bytes() == case.whole["out.gguf"], result.err
    lines = result.err.splitlines()
    assert all(line.isprintable() for line in lines) and [line.split(" ")[0] for line in lines[1:]] == TOLD
    assert "llama-cli -m -" not in result.err and "verify -" not in result.err


def test_stale_temporary_files_go_and_others_stay(case):
    case.reset()
    stale = [f".out.gguf.{number}{SUFFIX}" for number in (1, 99999999)]
    others = [f".other.gguf.1{SUFFIX}", f".out.gguf.x{SUFFIX}", f"out.gguf.1{SUFFIX}", ".out.gguf.1"]
    for name in stale + others:
        (case.folder / name).write_bytes(b"half")
    case.forge.run(*case.arguments, cwd=case.folder)
    after = snapshot(case.folder)
    assert not set(stale) & after.keys() and set(others) <= after.keys() and after["out.gguf"] == case.whole["out.gguf"]


def _command(out) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lora_gguf",
        "merge",
        str(smollm2_path()),
        str(DEMO_ADAPTER),
        "-o",
        str(out),
        "-t",
        "1",
    ]


def _start(out) -> subprocess.Popen:
    return subprocess.Popen(_command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_writers_of_one_output(tmp_path):
    """One wins, whole; the other is told, or comes later."""
    both = [_start(tmp_path / "out.gguf") for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    if codes not in ([0, 7], [0, 0]) or os.listdir(tmp_path) != ["out.gguf"]:
        raise Corruption(f"{codes}, {os.listdir(tmp_path)}, {errors}")
    with GgufReader(tmp_path / "out.gguf") as reader, GgufReader(smollm2_path()) as base:
        assert list(reader.tensors) == list(base.tensors)


def test_a_base_that_changes_during_the_merge(tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(smollm2_path(), base)
    (tmp_path / "out.gguf").write_bytes(OLD)
    command = [sys.executable, "-m", "lora_gguf", "merge", str(base), str(DEMO_ADAPTER)]
    command += ["-o", str(tmp_path / "out.gguf"), "--force", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for_temporary(tmp_path, process)
    process.send_signal(signal.SIGSTOP)
    os.utime(base)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 9 and "changed while it was read" in error and error.count("\n") == 1
    assert (tmp_path / "out.gguf").read_bytes() == OLD and sorted(os.listdir(tmp_path)) == ["base.gguf", "out.gguf"]


def test_a_base_that_shrinks_during_the_merge(tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(smollm2_path(), base)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_gguf", "merge", str(base), str(DEMO_ADAPTER), "-o", str(tmp_path / "out.gguf"), "-t", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _wait_for_temporary(tmp_path, process)
    process.send_signal(signal.SIGSTOP)
    os.truncate(base, 20_000_000)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 9 and error.count("\n") == 1 and os.listdir(tmp_path) == ["base.gguf"], error


def _wait_for_temporary(folder, process) -> None:
    deadline = time.monotonic() + 120
    while (
        not any(name.endswith(SUFFIX) for name in os.listdir(folder))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.002)


ON_MOUNTS = {
    "the base in a folder that is bound": ('mount --bind "$1" "$2"', "mnt/llama.gguf", "is also an input"),
    "the base as a file that is bound": (
        'touch "$2/o"; mount --bind "$1/llama.gguf" "$2/o"',
        "mnt/o",
        "is also an input",
    ),
    "a folder bound to be read only": (
        'mount --bind "$2" "$2"; mount -o remount,ro,bind "$2"',
        "mnt/o",
        "not writable",
    ),
    "a disk that is full": ('mount -t tmpfs -o size=64k none "$2"', "mnt/o", "make room"),
    "a disk with no room for one more file": ('mount -t tmpfs -o nr_inodes=1 none "$2"', "mnt/o", "No space left"),
}


@pytest.mark.parametrize("name", ON_MOUNTS)
def test_outputs_on_file_systems_of_their_own(case, name):
    script, out, expected = ON_MOUNTS[name]
    case.reset()
    (case.folder / "mnt").mkdir()
    with mounted(script, case.folder, case.folder / "mnt") as mounts:
        before, on_mount = snapshot(case.folder), snapshot(mounts.seen(case.folder / "mnt"))
        base, adapter, out = (case.folder / path for path in ("llama.gguf", "peft", out))
        command = mounts.command(sys.executable, "-m", "lora_gguf", "merge", base, adapter, "-o", out, "--force")
        run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        check_refusal(Result(run.returncode, run.stdout, run.stderr, 0, 0), {7})
        assert expected in run.stderr
        check_preserved(case.folder, before)
        check_preserved(mounts.seen(case.folder / "mnt"), on_mount)


def test_a_disk_that_others_fill_during_the_merge(tmp_path):
    with mounted('mount -t tmpfs -o size=150m none "$1"', tmp_path) as mounts:
        disk, command = mounts.seen(tmp_path), mounts.command(*_command(tmp_path / "out.gguf"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _wait_for_temporary(disk, process)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(OSError, match="No space left"), open(disk / "others", "wb", buffering=0) as others:
            while others.write(bytes(1 << 20)):
                pass
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=300)
        check_refusal(Result(process.returncode, "", error, 0, 0), {7})
        assert "No space left" in error and os.listdir(disk) == ["others"]


def test_two_signals_at_once(tmp_path):
    process = _start(tmp_path / "out.gguf")
    _wait_for_temporary(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, 143) and not os.listdir(tmp_path)


KEYS = [
    *(pack_kv(f"scalar.{i}", i, value) for i, value in SCALAR_VALUES.items()),
    *(pack_kv(f"array.{i}", ARRAY, array(i, 3, value * 3)) for i, value in SCALAR_VALUES.items()),
    pack_kv("empty", ARRAY, array(STRING, 0)),
    pack_kv("tokens", ARRAY, array(STRING, 20_000, b"".join(pack_string(f"t{i}") for i in range(20_000)))),
    pack_kv("invalid", STRING, pack_string(b"\xff\xfe\0")),
    pack_kv(b"key\xff", STRING, pack_string(b"x")),
    text_kv("tokenizer.chat_template", "{{ ''.__class__ }}" * 5000),
    pack_kv("bool", 7, b"\x02"),
]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_metadata_order_and_alignment_survive(case, tmp_path, alignment, version):
    keys = [
        u32_kv("general.alignment", alignment),
        text_kv("general.architecture", "llama"),
        u32_kv("llama.block_count", 1),
        *KEYS,
    ]
    weights = np.random.default_rng(3).normal(size=(8, 32)).astype(np.float32)
    names = ["z.weight", "blk.0.ffn_up.weight", "a.bias", "blk.0.ffn_down.weight"]
    tensors = [(name, "F32", (8, 32), weights.tobytes()) for name in names]
    (tmp_path / "base.gguf").write_bytes(pack_gguf(keys, tensors, version=version, alignment=alignment))
    factors = [
        ("blk.0.ffn_up.weight.lora_a", "F32", (1, 32), bytes(128)),
        ("blk.0.ffn_up.weight.lora_b", "F32", (8, 1), bytes(32)),
    ]
    head = [
        text_kv("general.architecture", "llama"),
        text_kv("general.type", "adapter"),
        text_kv("adapter.type", "lora"),
    ]
    (tmp_path / "adapter.gguf").write_bytes(pack_gguf(head, factors))
    result = case.forge.run(
        "merge", "base.gguf", "adapter.gguf", "-o", "out.gguf", "--min-retention", "0", cwd=tmp_path
    )
    assert result.code == 0, result.err
    with (
        GgufReader(tmp_path / "base.gguf") as before,
        GgufReader(tmp_path / "out.gguf") as after,
        Judge(with_data=True) as judge,
    ):
        assert raw_key_values(after)[: len(before.kv)] == raw_key_values(before)
        assert list(after.tensors) == names and after.alignment == alignment and after.data_position % alignment == 0
        assert all(after.read(after.tensors[name]).tobytes() == weights.tobytes() for name in names)
        assert judge.describe((tmp_path / "out.gguf").read_bytes()) is not None
        assert key_value("lora_gguf.seed", 0, "u64") in raw_key_values(after)
