"""What systems other than Linux lack, taken away: the same bytes come out, and nothing is overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from lora_gguf.cli.terms import with_scale
from lora_gguf.errors import FileError, LoraGgufError
from lora_gguf.files import output, positional
from lora_gguf.files.output import copy_file, write_bytes
from lora_gguf.hub.downloads import fetch_adapter as fetch
from lora_gguf.hub.downloads import fetch_model
from lora_gguf.hub.references import local_path
from lora_gguf.mapping.sources import adapter_name
from lora_gguf.merging.options import Policy
from tests.calls import merge
from tests.hub_faults import FILES, REPO
from tests.test_merge import base_and_adapter

# system -> what Python's os and signal modules do not have there
MISSING = {
    "Windows": (
        "os.preadv", "os.pread", "os.pwrite", "os.copy_file_range", "os.sendfile", "os.sched_getaffinity", "os.O_CLOEXEC",
        "signal.SIGHUP",
    ),
    "macOS 10": ("os.preadv", "os.copy_file_range", "os.sched_getaffinity"),
    "macOS": ("os.copy_file_range", "os.sched_getaffinity"),
}  # fmt: skip


@pytest.fixture(params=MISSING)
def elsewhere(request, monkeypatch):
    for name in MISSING[request.param]:
        module, _, attribute = name.partition(".")
        monkeypatch.delattr({"os": os, "signal": signal}[module], attribute, raising=False)
    if request.param == "Windows":
        monkeypatch.setattr(output, "fcntl", None)
        monkeypatch.setattr(output, "_sync_folder", lambda folder: None)
    return request.param


@pytest.fixture
def expected(tmp_path):
    """A merge as Linux does it, made before anything is taken away."""
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", rows=2048)
    merge(base, [(adapter, 1.0)], tmp_path / "expected.gguf", Policy(seed=5))
    return base, adapter, (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_merge_gives_the_same_bytes(expected, elsewhere, tmp_path, threads):
    base, adapter, content = expected
    merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy(seed=5), threads=threads)
    assert (tmp_path / "out.gguf").read_bytes() == content
    with pytest.raises(FileError, match="exists already"):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy(seed=5))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_file_that_appears_meanwhile_is_not_replaced(elsewhere, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "out"
    with pytest.raises(FileError, match="appeared"), output.OutputFile(target) as file:
        file.write_at(0, b"ours")
        target.write_bytes(b"theirs")
        file.commit()
    assert target.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["out"]
    write_bytes(target, b"ours", force=True)
    copy_file(target, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"ours"


@pytest.mark.filterwarnings("ignore:.*symlinks")
def test_a_fetch_works_without_symbolic_links_in_the_cache(elsewhere, local_hub, monkeypatch):
    def no_symlinks(*_, **__):
        raise OSError("no symbolic links here")

    monkeypatch.setattr(os, "symlink", no_symlinks)
    local_hub.repos[REPO] = dict(FILES)
    folder = fetch(REPO)
    assert (folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    assert not (folder / "adapter_model.safetensors").is_symlink() and fetch(REPO) == folder
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(LoraGgufError):
        fetch(REPO)


def test_seeks_of_many_threads_do_not_mix(elsewhere, tmp_path):
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            positional.write(fd, memoryview(bytes([number]) * 4096), number * 4096)
            found = memoryview(bytearray(4096))
            n = positional.read_into(fd, found, number * 4096)
            wrong.extend([number] * (n != 4096 or bytes(found) != bytes([number]) * 4096))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert not wrong and path.stat().st_size == 8 * 4096


def test_the_command_line_starts_and_ends(elsewhere, tmp_path):
    names = [name.partition(".")[::2] for name in MISSING[elsewhere]]
    without = "; ".join(f"vars({module}).pop('{attribute}', None)" for module, attribute in names)
    code = f"import os, signal, subprocess, sys; {without}; sys.modules['fcntl'] = None; from lora_gguf.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "inspect", tmp_path / "no.gguf"], capture_output=True, text=True, timeout=60
    )
    assert (
        ended.returncode == 7 and ended.stderr.startswith("lora-gguf: error: ") and "Traceback" not in ended.stderr
    ), ended.stderr


def test_names_that_a_terminal_cannot_show(tmp_path):
    folder = tmp_path / "ü→"
    folder.mkdir()
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "lora_gguf", "fetch", folder], capture_output=True, env=env, timeout=60
    )
    assert ended.returncode == 0 and ended.stdout.decode("ascii").strip().endswith("\\xfc\\u2192"), ended.stderr


@pytest.mark.parametrize(
    "path", ["C:\\models\\base.gguf", "C:/models/base.gguf", "\\\\server\\share\\base.gguf", "..\\base.gguf"]
)
def test_windows_paths_are_paths(path):
    assert (
        str(fetch_model(path)) == path and with_scale(path) == (path, 1.0) and with_scale(f"{path}:0.5") == (path, 0.5)
    )
    if "\\" in path:
        with pytest.raises(FileError, match="no such file"):
            local_path(path.removesuffix(".gguf"))


def test_a_folder_with_an_at_sign_keeps_its_name(tmp_path):
    folder = tmp_path / "me@work" / "tuned"
    folder.mkdir(parents=True)
    assert adapter_name(folder) == "tuned" and adapter_name("o/tuned@me/work") == "tuned"
