"""Every file of the corpora through the command line."""

from __future__ import annotations

import pytest

from tests.refusals import CORPORA, holes


@pytest.mark.campaign("refusals by the command line")
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_contract_of_a_refusal(case, record_property, corpus):
    record_property("runs", len(CORPORA[corpus][1]))
    assert list(holes(case, corpus)) == []
