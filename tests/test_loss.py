"""What is expected to be lost of a fine-tune's effect, beside what was measured: on cells that the constants were fitted
on, and on others.

``fixtures/expected-loss.json`` records the share of the effect that each of many merges lost, as ``tests.bench.fidelity``
measures it on text of the adapter's kind, where that is at least 0.2%, with the energies, relative to the weights', of its update and of its noise.
"""

from __future__ import annotations

import json
import re

import pytest

from lora_gguf import api
from lora_gguf.merging.loss import expected_loss, harm, loss_text
from lora_gguf.quants.table import CODECS
from tests.common import DEMO_ADAPTER, FIXTURES, ROOT, smollm2_path
from tests.test_cli import run
from tests.test_merge import base_and_adapter

CELLS = json.loads((FIXTURES / "expected-loss.json").read_text())
DOC = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def told(cell):
    """The share that is shown of a cell."""

    noise = 0.0
    for name, energy in cell["noise"].items():
        moved = cell["rounding"] == "auto" and CODECS[name].grid is not None
        noise += harm(CODECS[name], CODECS[name], moved) * energy
    return expected_loss(cell["kept"], noise, cell["update"])


def within_two(cell):
    share = min(cell["share"], 1.0)
    return share / 2 <= told(cell) <= share * 2


@pytest.mark.parametrize("fitted", [True, False])
def test_nine_of_ten_are_within_a_factor_of_two(fitted):
    cells = [cell for cell in CELLS if cell["fitted"] == fitted]
    good = [within_two(cell) for cell in cells]
    assert len(cells) >= 10 and sum(good) >= 0.9 * len(cells), [c for c, ok in zip(cells, good) if not ok]
    row = next(line for line in DOC.splitlines() if line.startswith("| fitted: " if fitted else "| not fitted: "))
    assert row.endswith(f" | {len(cells)} | {sum(good)} |")


def test_the_default_is_within_a_factor_of_two_everywhere():
    assert all(within_two(cell) for cell in CELLS if cell["rounding"] == "auto" and cell["fitted"])


@pytest.mark.parametrize(("name", "adapter"), [("perl", FIXTURES / "perl-adapter"), ("pirate", DEMO_ADAPTER)])
def test_merge_doctor_and_verify_tell_what_was_measured(tmp_path, name, adapter):
    out = tmp_path / "out.gguf"
    wanted = {cell["rounding"]: cell["share"] for cell in CELLS if (cell["base"], cell["adapter"], cell["scale"]) == (
        "SmolLM2 Q4_1", name, 1)}  # fmt: skip
    doctor = api.doctor(smollm2_path(), adapter)
    for way in ("auto", "dither", "fresh"):
        expected = doctor.outlook(way).expected_loss
        assert wanted[way] / 2 <= expected <= wanted[way] * 2
    merged = api.merge(smollm2_path(), adapter, out)
    proof = api.verify(out, smollm2_path(), adapter)
    assert merged.expected_loss == pytest.approx(doctor.outlook("auto").expected_loss, rel=0.1)
    assert proof.expected_loss == pytest.approx(merged.expected_loss, rel=1e-6)
    assert loss_text(merged.expected_loss) in merged.verdict
    assert merged.as_dict()["expected_loss"] == merged.expected_loss == proof.as_dict()["expected_loss"]


def test_it_is_told_where_it_is_known(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "F16")
    promoted = api.merge(base, adapter, tmp_path / "one.gguf")
    assert 0 <= promoted.expected_loss < 0.5
    quantized = api.merge(base, adapter, tmp_path / "two.gguf", quantize="Q4_0")
    assert quantized.expected_loss is None and "effect" not in quantized.verdict
    idle = api.merge(base, (adapter, 0.0), tmp_path / "three.gguf")
    assert idle.expected_loss is None


@pytest.mark.parametrize(
    ("loss", "text"),
    [(None, "-"), (0.0, "less than 1%"), (0.0074, "less than 1%"), (0.0076, "about 1%"), (0.054, "about 5%"),
     (0.86, "about 90%"), (0.97, "nearly all"), (1.0, "nearly all")],
)  # fmt: skip
def test_it_is_told_as_coarsely_as_it_is_known(loss, text):
    assert loss_text(loss) == text


def test_much_that_is_lost_is_not_good(tmp_path):
    merged = api.merge(smollm2_path(), (FIXTURES / "perl-adapter", 0.01), tmp_path / "out.gguf")
    assert merged.whole.kept > 0.8 and merged.expected_loss > 0.25
    assert re.search(r": (fair|poor); --type Q8_0 loses less, in a larger file$", merged.verdict)
    assert "merge with --type " in api.doctor(smollm2_path(), (FIXTURES / "perl-adapter", 0.01)).recommendation


@pytest.mark.parametrize("command", ["doctor", "verify"])
def test_the_noise_is_for_those_who_ask_for_all(tmp_path, capsys, command):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", size=2e-3)
    out = tmp_path / "out.gguf"
    api.merge(base, adapter, out)
    words = [base, adapter] if command == "doctor" else [out, "--base", base, "--lora", adapter]
    brief, whole = (run(capsys, command, *words, *more) for more in ([], ["--verbose"]))
    assert "noise/delta" not in brief[1] and "noise/delta" in whole[1]
    assert ("effect lost" in brief[1]) == (command == "doctor")
    assert command == "doctor" or "of the fine-tune's effect is lost" in brief[2]
