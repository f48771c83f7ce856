"""``push``: what comes to lie on the Hub, by huggingface_hub's own client against the tests' Hub."""

from __future__ import annotations

import hashlib
import json

import pytest

from lora_gguf import api, errors
from lora_gguf.commands.card import MARK
from tests import tiny
from tests.common import text_kv
from tests.hub import TOKEN
from tests.test_cli import run

REPO = "user/my-model"


@pytest.fixture
def merged(tmp_path):
    base = tiny.base_gguf(tmp_path, "llama")
    api.merge(base, (tiny.TINY / "llama" / "adapter", 0.5), tmp_path / "merged.gguf")
    return tmp_path / "merged.gguf"


def test_the_file_its_modelfile_and_a_card_are_pushed_to_a_private_repository(local_hub, merged, capsys):
    code, out, err = run(capsys, "push", merged, REPO)
    files = local_hub.repos[REPO]
    assert code == 0 and out.startswith(local_hub.endpoint) and f"-hf {REPO}" in err and TOKEN not in out + err
    assert files["merged.gguf"] == merged.read_bytes() and files["Modelfile"].startswith(b"FROM ./merged.gguf\n")
    assert set(files) == {"merged.gguf", "Modelfile", "README.md"} and local_hub.private[REPO]
    assert local_hub.messages == ["Add merged.gguf"]


def test_the_card_says_how_the_file_was_made(local_hub, merged):
    api.push(merged, REPO, public=True, kept=0.987)
    text = local_hub.repos[REPO]["README.md"].decode()
    front = text.split("---")[1].strip().splitlines()
    read = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front)}
    assert read["library_name"] == "gguf" and "lora-gguf" in read["tags"]
    for said in ("adapter at scale 0.5", "0.987", "seed 0", f"llama-cli -hf {REPO} --hf-file merged.gguf",
                 "lora-gguf verify merged.gguf --base BASE.gguf --lora adapter:0.5"):  # fmt: skip
        assert said in text
    assert not local_hub.private[REPO]


def test_the_base_and_its_licence_are_named_where_the_metadata_do(local_hub, tmp_path):
    extra = [text_kv("general.license", "apache-2.0"), text_kv("general.repo_url", "https://huggingface.co/lab/Tiny")]
    base = tiny.base_gguf(tmp_path, "llama", extra=extra)
    api.merge(base, tiny.TINY / "llama" / "adapter", tmp_path / "merged.gguf")
    api.push(tmp_path / "merged.gguf", REPO)
    text = local_hub.repos[REPO]["README.md"].decode()
    assert 'license: "apache-2.0"' in text and "| licence of the base | apache-2.0 |" in text
    assert 'base_model: ["lab/Tiny"]' in text


def test_a_second_push_sends_nothing_large_and_makes_no_commit(local_hub, merged):
    api.push(merged, REPO)
    before = len(local_hub.requests("PUT /lfs/"))
    api.push(merged, REPO)
    assert len(local_hub.requests("PUT /lfs/")) == before == 1 and len(local_hub.messages) == 1


def test_a_push_that_was_stopped_goes_on_where_it_was(local_hub, tmp_path):
    base = tiny.base_gguf(tmp_path, "llama")
    api.merge(base, tiny.TINY / "llama" / "adapter", tmp_path / "big.gguf", max_bytes=base.stat().st_size // 2)
    shards = sorted(tmp_path.glob("big-*.gguf"))
    assert len(shards) >= 2
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    local_hub.fault(f"PUT /lfs/{last}", lambda handler: handler.send_error_code(403) or True, times=1)
    with pytest.raises(errors.HubError):
        api.push(shards[0], REPO)
    assert not local_hub.messages and not local_hub.repos[REPO]
    api.push(shards[-1], REPO)
    first = hashlib.sha256(shards[0].read_bytes()).hexdigest()
    assert len(local_hub.requests(f"PUT /lfs/{first}")) == 1
    assert {path.name for path in shards} | {"README.md"} == set(local_hub.repos[REPO])


def test_a_card_that_somebody_wrote_stays_and_ours_is_made_anew(local_hub, merged, capsys):
    local_hub.repos[REPO] = {"README.md": b"# mine"}
    _, _, err = run(capsys, "push", merged, REPO)
    assert local_hub.repos[REPO]["README.md"] == b"# mine" and "left as it is" in err
    local_hub.repos[REPO]["README.md"] = f"# old\n{MARK}\n".encode()
    api.push(merged, REPO)
    assert b"# old" not in local_hub.repos[REPO]["README.md"]


def test_merge_and_push_at_once(local_hub, tmp_path, capsys):
    base, adapter = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    code, _, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--push", REPO)
    assert code == 0 and "pushed to" in err and "out.gguf" in local_hub.repos[REPO]
    assert b"kept of the adapters | 1.0" in local_hub.repos[REPO]["README.md"]


@pytest.mark.parametrize("word", ["--dry-run", "--shard=1/2"])
def test_what_writes_no_whole_file_is_not_pushed(local_hub, tmp_path, capsys, word):
    base, adapter = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    code, _, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--push", REPO, word)
    assert code == errors.UsageError.exit_code and not local_hub.repos and not (tmp_path / "out.gguf").exists()


def test_refusals_come_before_the_work_and_say_what_to_do(local_hub, merged, tmp_path, monkeypatch, capsys):
    for arguments, code, said in (
        (["push", merged, "no-owner"], errors.HubError.exit_code, "expected OWNER/NAME"),
        (["push", tmp_path / "no.gguf", REPO], errors.FileError.exit_code, "no.gguf"),
        (["push", tiny.TINY / "llama" / "adapter", REPO], errors.FileError.exit_code, "adapter"),
    ):
        found, _, err = run(capsys, *arguments)
        assert (found, said in err, err.count("\n")) == (code, True, 1), err
    assert not local_hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    found, _, err = run(capsys, "push", merged, REPO)
    assert found == errors.HubError.exit_code and "hf auth login" in err and "hf_another" not in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    found, _, err = run(capsys, "push", merged, REPO)
    assert found == errors.HubError.exit_code and "hf auth login" in err
    assert not local_hub.repos


def test_a_merge_that_cannot_be_pushed_is_not_begun(local_hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    base, adapter = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    code, _, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out.gguf", "--push", REPO)
    assert code == errors.HubError.exit_code and not (tmp_path / "out.gguf").exists()
