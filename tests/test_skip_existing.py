"""``--skip-existing``: what the same merge made before is left, and nothing else is taken for it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from lora_gguf import api
from lora_gguf.errors import FileError
from tests.test_cli import run
from tests.test_merge import base_and_adapter

OTHERS = {
    "another seed": {"seed": 1},
    "another rounding": {"rounding": "nearest"},
    "another type": {"type": "Q8_0"},
}


@pytest.fixture
def files(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    return base, adapter, tmp_path / "out.gguf"


def test_the_same_merge_is_not_made_twice(files):
    api.merge(*files, skip_existing=True)
    before = files[2].stat().st_mtime_ns
    report = api.merge(*files, skip_existing=True)
    assert report.skipped and report.written == [files[2]] and files[2].stat().st_mtime_ns == before
    with pytest.raises(FileError, match="exists already"):
        api.merge(*files)


@pytest.mark.parametrize("way", [{"max_bytes": 30_000}, {"max_bytes": 30_000, "shard": "2/2"}])
def test_shards(files, way):
    first = api.merge(*files, skip_existing=True, **way)
    second = api.merge(*files, skip_existing=True, **way)
    assert second.skipped and second.written == first.written != []
    first.written[-1].unlink()
    with pytest.raises(FileError, match="exists already") if len(first.written) > 1 else np.errstate():
        assert not api.merge(*files, skip_existing=True, **way).skipped


@pytest.mark.parametrize("other", OTHERS)
def test_another_merge_is_not_taken_for_it(files, other):
    api.merge(*files, **OTHERS[other])
    content = files[2].read_bytes()
    with pytest.raises(FileError, match="exists already"):
        api.merge(*files, skip_existing=True)
    assert files[2].read_bytes() == content
    assert not api.merge(*files, skip_existing=True, force=True).skipped and files[2].read_bytes() != content


@pytest.mark.parametrize("broken", ["cut short", "empty", "another adapter", "another base"])
def test_what_is_not_whole_or_of_others(files, broken):
    base, adapter, out = files
    api.merge(*files)
    if broken in ("cut short", "empty"):
        out.write_bytes(out.read_bytes()[:-1] if broken == "cut short" else b"")
    else:
        changed = base if broken == "another base" else adapter
        raw = changed.read_bytes()
        changed.write_bytes(
            raw.replace(b"llama.block_count", b"llama.block_kount")
            if changed == base
            else raw[:-4] + np.float32(0.5).tobytes()
        )
    with pytest.raises(FileError, match="exists already"):
        api.merge(*files, skip_existing=True)


def test_on_the_command_line(files, capsys):
    base, adapter, out = files
    assert run(capsys, "merge", base, adapter, "-o", out, "--skip-existing")[0] == 0
    code, printed, said = run(capsys, "merge", base, adapter, "-o", out, "--skip-existing")
    assert code == 0 and f"{out}: the same merge made it before: left as it is" in said and "wrote" not in said
    assert run(capsys, "merge", base, adapter, "-o", out, "--skip-existing", "-q") == (0, f"{out}\n", "")
    assert os.listdir(out.parent).count("out.gguf") == 1
