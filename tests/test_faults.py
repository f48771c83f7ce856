"""Every call of the system that a merge and a conversion make fails once; the limits of the system; closed and full
streams.
"""

from __future__ import annotations

import pytest

from tests.faulty import ERRORS, SIGNALS, every_call, holes, prepare


@pytest.fixture(scope="module")
def case(forge, tmp_path_factory):
    return prepare(forge, tmp_path_factory.mktemp("merge"), "merge")


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("kinds", [ERRORS, (*SIGNALS, "SIGKILL")], ids=["errors", "signals"])
def test_every_call_of_a_merge_once(case, record_property, kinds):
    record_property("runs", len(case.calls))
    assert holes(case, every_call(case, *kinds)) == []


@pytest.mark.campaign("faults")
def test_the_order_of_what_makes_a_file_durable(case):
    last = [call for call in case.calls if call in ("pwrite", "copy_file_range", "fsync", "replace", "link")]
    assert last[-3:] == ["fsync", "replace", "fsync"] and {"pwrite", "copy_file_range"} == set(last[:-3])


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("files", [8, 9, 10])
def test_few_descriptors(case, files):
    result = case.run(limits={"files": files})
    case.judge(result, "files")
    assert result.code == 7


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.9999])
def test_files_that_may_not_grow(case, share):
    result = case.run(limits={"size": int(len(case.whole["out.gguf"]) * share)})
    case.judge(result, "size")
    assert result.code == 7


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("megabytes", [1, 10, 30, 100, 300])
def test_little_memory(case, megabytes):
    """More than the process has at its start, by so much."""
    case.judge(case.run(limits={"memory": megabytes}), "memory")


STREAMS = {
    "stdout closed": ({1: None}, 0),
    "stderr closed": ({2: None}, 0),
    "both closed": ({1: None, 2: None}, 0),
    "stdout full": ({1: "/dev/full"}, 7),
    "stderr full": ({2: "/dev/full"}, 0),
}


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_take_nothing(case, name):
    stdio, code = STREAMS[name]
    result = case.run(stdio=stdio)
    assert result.code == code, result.err
    assert (case.folder / "out.gguf").read_bytes() == case.whole["out.gguf"]
    if 2 not in stdio:
        words = [line.split(" ")[0] for line in result.err.splitlines()]
        assert words[1:] == ["wrote", "run", "check"] if code == 0 else len(words) == 1
