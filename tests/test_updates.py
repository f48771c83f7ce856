"""``kinds`` and ``updates``: an adapter of every kind that PEFT trains, against the weights of PEFT's own merge."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.adapters.updates import Hadamard, Kronecker, Replaced, Rotated
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import Hparams, from_config
from lora_gguf.mapping.placement import shifted_norm
from tests import tiny
from tests.calls import gguf_pairs
from tests.common import FIXTURES

KINDS = FIXTURES / "kinds"
NAMES = sorted(path.parent.name for path in KINDS.glob("*/merged.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


def place(name, folder, **options):
    base = (KINDS / name / "base").read_text()
    with GgufReader(tiny.base_gguf(folder, base)) as reader:
        tied = "shared" if base == "gemma2" else "separate"
        return gguf_pairs(read_adapter(KINDS / name), reader, updates=True, new_tokens=True, tied=tied, **options)


def merged(placement, tensors, n_rows):
    """The tensors that a merge in chunks of ``n_rows`` changes, in f32."""
    found = {}
    for pair in placement.pairs:
        found[pair.name] = tensors[pair.name] + pair.delta()
    for name in {update.name for update in placement.updates}:
        before = tensors[name].reshape(-1, tensors[name].shape[-1])
        after = found.get(name, tensors[name]).reshape(before.shape).copy()
        for first in range(0, len(before), n_rows):
            rows = slice(first, first + n_rows)
            after[rows] += sum(u.change(first, before[rows]) for u in placement.updates if u.name == name)
        found[name] = after.reshape(tensors[name].shape)
    for name, rows in placement.new_rows.items():
        found[name] = np.concatenate([found[name], rows])
    return found


def weights_of(path, base):
    """A file of Hugging Face weights as GGUF tensors."""
    model = from_config(tiny.config_of(base))
    return tiny.tensors_from(path, model)


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_weights_are_pefts(name, folder):
    base = (KINDS / name / "base").read_text()
    tensors = weights_of(tiny.TINY / base / "base.safetensors", base)
    wanted = weights_of(KINDS / name / "merged.safetensors", base)
    placement = place(name, folder)
    found = merged(placement, tensors, 5)
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=3e-6 * max(1, np.abs(array).max()), err_msg=key)
        assert np.abs(array[: len(tensors[key])] - tensors[key]).max() > 1e-3
    assert {account.outcome for account in placement.accounts} <= {"applied", "ignored"}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_accounted_for_once(name, folder):
    from lora_gguf.files.weights import read_weights

    accounts = [account.tensor for account in place(name, folder).accounts]
    assert sorted(accounts) == sorted(read_weights(KINDS / name / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["dora", "oft", "boft", "loha", "lokr", "ia3", "whole", "tokens", "gate-dora"])
def test_bytes_do_not_depend_on_the_chunks(name, folder):
    base = (KINDS / name / "base").read_text()
    tensors, placement = weights_of(tiny.TINY / base / "base.safetensors", base), place(name, folder)
    one, other = merged(placement, tensors, 7), merged(placement, tensors, 10_000)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_low_rank_after_all(kind, folder):
    for update in place(kind, folder).updates:
        pair = update.as_pair()
        whole = update.change(0, np.zeros(update.shape, np.float32))
        np.testing.assert_allclose(pair.delta(), whole, atol=1e-6)


def update_of(kind, rng):
    """A random update of each kind in which columns or rows are told apart by where they stand."""
    if kind is Hadamard:
        pairs = tuple(
            (rng.standard_normal((12, 2), np.float32), rng.standard_normal((2, 8), np.float32)) for _ in range(2)
        )
        return Hadamard(name="x", shape=(12, 8), scale=1.5, pairs=pairs, rows=np.arange(12), cols=np.arange(8))
    if kind is Kronecker:
        left, right = rng.standard_normal((3, 4), np.float32), rng.standard_normal((4, 2), np.float32)
        return Kronecker(
            name="x", shape=(12, 8), scale=0.5, left=left, right=right, rows=np.arange(12), cols=np.arange(8)
        )
    blocks = rng.standard_normal((2, 4, 4)).astype(np.float32)
    return Rotated(
        name="x",
        shape=(12, 8),
        stages=[(None, blocks), (rng.permutation(8), blocks[::-1].copy())],
        row_factors=rng.random(12, np.float32),
    )


@pytest.mark.parametrize("kind", [Hadamard, Kronecker, Rotated])
def test_taking_a_piece_commutes_with_the_update(kind):
    rng = np.random.default_rng(3)
    update, weights = update_of(kind, rng), rng.standard_normal((12, 8), np.float32)
    rows, cols = rng.permutation(12)[:7], rng.permutation(8)
    part = update.take(Piece("y", rows, cols, offset=2))
    wanted = update.change(0, weights)[rows][:, cols]
    base = np.concatenate([np.ones((2, 8), np.float32), weights[rows][:, cols], np.ones((3, 8), np.float32)])
    found = part.change(0, base)
    np.testing.assert_allclose(found[2:9], wanted, rtol=1e-5, atol=1e-6)
    assert part.name == "y" and not found[:2].any() and not found[9:].any()


def test_a_pair_takes_a_piece():
    rng = np.random.default_rng(4)
    pair = LoraPair("x", rng.standard_normal((2, 8), np.float32), rng.standard_normal((12, 2), np.float32), 3.0)
    rows, cols, scale = rng.permutation(12), rng.permutation(8), rng.random(12)
    part = pair.take(Piece("y", rows, cols, scale, transpose=True))
    np.testing.assert_allclose(part.delta(), (pair.delta()[rows][:, cols] * scale[:, None]).T, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["chameleon", "plamo2", "plamo3"])
def test_norms_that_differ_one_by_one_are_refused(architecture):
    hparams = Hparams(architecture, {"block_count": 1}, {}, {}, "base")
    update = Replaced(name="model.layers.0.norm", shape=(1, 4), values=np.ones((1, 4), np.float32))
    with pytest.raises(UnsupportedError, match=f"whole norms of {architecture}"):
        shifted_norm(update, Piece("blk.0.attn_norm.weight"), hparams)
