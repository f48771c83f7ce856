from __future__ import annotations

import os
import stat

import pytest

from lora_gguf.errors import FileError
from lora_gguf.files import output
from lora_gguf.files.output import SUFFIX, OutputFile, write_bytes


def leftovers(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIX)]


def test_written_whole(tmp_path):
    write_bytes(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content" and not leftovers(tmp_path)


def test_umask_respected(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_existing_output_is_kept_without_force(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileError, match="exists already"):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    write_bytes(tmp_path / "a", b"new", force=True)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_output_that_appears_in_the_meantime_wins(tmp_path):
    with pytest.raises(FileError, match="appeared"), OutputFile(tmp_path / "a") as out:
        out.write_at(0, b"ours")
        (tmp_path / "a").write_bytes(b"theirs")
        out.commit()
    assert (tmp_path / "a").read_bytes() == b"theirs" and not leftovers(tmp_path)


def test_left_without_commit_nothing_remains(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError), OutputFile(tmp_path / "a", force=True) as out:
        out.write_at(0, b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old" and not leftovers(tmp_path)


@pytest.mark.parametrize("spelling", ["same", "dotted", "symlink", "hardlink"])
def test_never_its_own_input(tmp_path, spelling):
    source = tmp_path / "base.gguf"
    source.write_bytes(b"precious")
    paths = {
        "same": source,
        "dotted": tmp_path / "." / "base.gguf",
        "symlink": tmp_path / "s",
        "hardlink": tmp_path / "h",
    }
    (tmp_path / "s").symlink_to(source)
    os.link(source, tmp_path / "h")
    with pytest.raises(FileError, match="also an input"):
        write_bytes(paths[spelling], b"x", force=True, inputs=[source])
    assert source.read_bytes() == b"precious"


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "directory"),
        (_fifo, "directory or device"),
        (lambda path: path.symlink_to("nowhere"), "link to nowhere"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
    ],
)
def test_refuses_what_is_not_a_file(tmp_path, make, message):
    make(tmp_path / "a")
    with pytest.raises(FileError, match=message):
        write_bytes(tmp_path / "a", b"x", force=True)


def test_missing_folder(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        write_bytes(tmp_path / "no" / "a", b"x")


def test_stale_temporary_files_of_the_target_are_removed(tmp_path):
    stale, other = tmp_path / f".a.99{SUFFIX}", tmp_path / f".b.99{SUFFIX}"
    stale.write_bytes(b"x")
    other.write_bytes(b"x")
    with OutputFile(tmp_path / "a") as running:
        write_bytes(tmp_path / "c", b"x")
        assert running.temporary.exists() and not stale.exists() and other.exists()
        OutputFile(tmp_path / "a")
        assert running.temporary.exists()  # it is locked: in use


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "close"])
def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    real = getattr(os, call)
    with pytest.raises(FileError, match="a: "), OutputFile(tmp_path / "a") as out:
        if call == "link":
            monkeypatch.setattr(output.os, "replace", fail)
        monkeypatch.setattr(output.os, call, fail)
        try:
            out.write_at(0, b"x")
            out.commit()
        finally:
            monkeypatch.setattr(output.os, call, real)
    assert not (tmp_path / "a").exists() and not leftovers(tmp_path)


def test_what_the_disk_says_while_the_rest_is_made_is_heard(tmp_path, monkeypatch):
    """The system tells a failed write-back once: the next fsync would succeed."""
    answers = iter([OSError(5, "Input/output error")])
    calls = []

    def fsync(fd):
        calls.append(fd)
        if error := next(answers, None):
            raise error

    monkeypatch.setattr(output, "_SYNC_BYTES", 4)
    monkeypatch.setattr(output.os, "fsync", fsync)
    with pytest.raises(FileError, match="a: cannot finish: Input/output error"), OutputFile(tmp_path / "a") as out:
        for position in range(0, 12, 3):
            out.write_at(position, b"xyz")
        out.commit()
    assert len(calls) == 1 and not (tmp_path / "a").exists() and not leftovers(tmp_path)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(output.os, "pwrite", lambda fd, data, position: real(fd, bytes(data)[:3], position))
    write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_copy_with_and_without_the_kernels_help(tmp_path, monkeypatch):
    (tmp_path / "s").write_bytes(bytes(range(200)))
    fd = os.open(tmp_path / "s", os.O_RDONLY)
    for name in ("k", "p"):
        with OutputFile(tmp_path / name) as out:
            out.copy_at(5, fd, 10, 100)
            out.commit()
        monkeypatch.delattr(output.os, "copy_file_range", raising=False)
    os.close(fd)
    assert (tmp_path / "k").read_bytes() == (tmp_path / "p").read_bytes() == bytes(5) + bytes(range(10, 110))


def test_no_room(tmp_path):
    with pytest.raises(FileError, match="make room"):
        output.check_space(tmp_path / "a", 1 << 60)
