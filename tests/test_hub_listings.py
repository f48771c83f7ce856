"""Listings that a Hub should not send, and names that no Hub has: each ends in one line."""

from __future__ import annotations

import pytest

from lora_gguf.errors import HubError, IntegrityError, UsageError
from lora_gguf.hub.downloads import fetch_adapter as fetch
from lora_gguf.hub.downloads import fetch_model as local_model
from lora_gguf.hub.quantizations import find_quantizations
from tests.hub import GGUF_REPO
from tests.hub_faults import BLOB, FILES, REPO, WEIGHTS, cache_of, content, redirect, wrong
from tests.test_cli import run


@pytest.fixture
def hub(local_hub):
    local_hub.repos[REPO] = dict(FILES)
    return local_hub


def listed_with(hub, **changes):
    """Lists the files of ``REPO`` with fields changed; a value of None takes the field away."""
    for name, body in FILES.items():
        entry = hub.sibling(name, body)
        for key, value in changes.items():
            entry.pop(key, None) if value is None else entry.update({key: value})
        hub.listing_changes.setdefault("siblings", []).append(entry)


@pytest.mark.parametrize("size", ["123", [1], {"a": 1}, -5, 1.5, True, ""])
def test_a_size_that_is_no_number(hub, capsys, size):
    listed_with(hub, size=size)
    code, out, err = run(capsys, "fetch", REPO)
    assert (code, out) == (HubError.exit_code, "") and err.count("\n") == 1 and "as its size" in err


@pytest.mark.parametrize("lfs", ["x", [1], {"sha256": 5}, {"sha256": "0" * 64, "size": "x", "pointerSize": []}])
def test_an_lfs_entry_that_is_none(hub, lfs):
    listed_with(hub, lfs=lfs)
    with pytest.raises((HubError, IntegrityError)) as caught:
        fetch(REPO)
    assert str(caught.value).isprintable()


def test_without_hashes_the_answer_s_own_are_compared(hub, tmp_path):
    listed_with(hub, lfs=None, blobId=None)
    assert (fetch(REPO) / "adapter_model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("links", [True, False])
def test_without_hashes_a_wrong_file_is_found(hub, tmp_path, monkeypatch, links):
    if not links:
        from huggingface_hub import file_download

        monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    listed_with(hub, lfs=None, blobId=None)
    hub.fault(BLOB, content(wrong(WEIGHTS)))
    with pytest.raises(IntegrityError):
        fetch(REPO)
    assert wrong(WEIGHTS) not in cache_of(tmp_path).values()


def test_no_hash_anywhere_is_refused(hub, tmp_path):
    listed_with(hub, lfs=None, blobId=None)

    def bare(handler):
        handler.send_content(WEIGHTS, {"ETag": '"v1"', "X-Repo-Commit": hub.commit})
        return True

    hub.fault("/resolve/.*adapter_model", bare)
    with pytest.raises(HubError, match="no hash"):
        fetch(REPO)
    assert WEIGHTS not in cache_of(tmp_path).values()


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://[", "//", "http://a:b:c/", "http:///x", "\\\\x", "http://%zz"]
)
def test_redirects_to_nowhere(hub, capsys, location):
    hub.fault("/resolve/.*adapter_model", redirect(location))
    code, _, err = run(capsys, "fetch", REPO)
    assert code == HubError.exit_code and err.count("\n") == 1 and "internal" not in err


TWINS = {"a/Tiny-1B-Q4_K_M.gguf": b"GGUFa" * 9, "b/Tiny-1B-Q4_K_M.gguf": b"GGUFb" * 9, "Tiny-1B-Q8_0.gguf": b"GGUF8"}


def test_two_files_of_one_quantization_are_for_the_user_to_choose(gguf_hub):
    gguf_hub.repos[GGUF_REPO] = dict(TWINS)
    for wish in ("", ":Q4_K_M"):
        with pytest.raises(UsageError) as caught:
            local_model(f"{GGUF_REPO}{wish}")
        assert all(f"hf://{GGUF_REPO}/{name}" in str(caught.value) for name in list(TWINS)[:2])
    assert local_model(f"hf://{GGUF_REPO}/b/Tiny-1B-Q4_K_M.gguf").read_bytes() == TWINS["b/Tiny-1B-Q4_K_M.gguf"]
    assert local_model(f"{GGUF_REPO}:Q8_0").read_bytes() == b"GGUF8"


@pytest.mark.parametrize("name", ["a/" + "b" * (1 << 20), "a" * 90 + "/bcdefgh", "a/b..c"])
def test_base_names_that_no_hub_has(gguf_hub, name):
    with pytest.raises(HubError, match="not a Hub id") as caught:
        find_quantizations(name)
    assert len(str(caught.value)) < 300 and not gguf_hub.log
