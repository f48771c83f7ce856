"""Every file of the corpora through the command line."""

from __future__ import annotations

import pytest

from tests.faulty import prepare
from tests.forked import Forge
from tests.refusals import CORPORA, holes

@pytest.fixture(scope="module")
def case(tmp_path_factory):
    with Forge() as forge:
        yield prepare(forge, tmp_path_factory.mktemp("case"), "merge a folder")

@pytest.mark.campaign("refusals by the command line")
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_contract_of_a_refusal(case, record_property, corpus):
    record_property("runs", len(CORPORA[corpus][1]))
    assert list(holes(case, corpus)) == []
