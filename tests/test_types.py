"""What is known of every type, asked of ggml where ggml knows: what one forgets to say of a new type fails here."""

import numpy as np
import pytest

from lora_gguf.merging.rows import HALVES
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.mixes import fallback_type
from lora_gguf.quants.table import CODECS
from tests.common import valid_rows

WIDTH = 512
ALL = sorted(CODECS)
GRIDS = sorted(name for name, codec in CODECS.items() if codec.grid)


def blocks_of(name: str, n_rows: int = 4) -> np.ndarray:
    """Rows as the type's own quantizer makes them of a normal distribution."""
    weights = (np.random.default_rng(3).normal(size=(n_rows, WIDTH)) * 0.02).astype(np.float32)
    return CODECS[name].encoded(weights, np.ones(WIDTH if CODECS[name].needs_importance else 0, np.float32))


@pytest.mark.parametrize("name", ALL)
def test_where_its_scales_are_is_where_ggml_looks(name):
    """A NaN at each even byte of a block, and 255 at each byte: ggml refuses just the blocks that we call broken."""
    codec, stored = CODECS[name], blocks_of(name)
    of_block = codec.type.block_bytes
    if of_block in (2, 4):
        pytest.skip("each weight is a scale of its own: a merge's sums tell")
    assert valid_rows(name, stored) and not codec.broken(stored.reshape(-1, of_block)).any()
    for at in range(of_block):
        for value in (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\xff"):
            spoilt = stored.copy().reshape(-1, of_block)
            if at + len(value) <= of_block:
                spoilt[1, at : at + len(value)] = np.frombuffer(value, np.uint8)
                valid = valid_rows(name, spoilt) or name == "IQ1_M"  # its scale lies in pieces over four words
                assert codec.broken(spoilt).any() is not valid or bool(codec.broken(spoilt)[1]) is not valid, at


def test_every_type_of_weights_has_a_codec():
    """Those without are integers, and what ggml keeps activations in while it multiplies."""
    assert set(BY_NAME) - set(CODECS) == {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}


@pytest.mark.parametrize("name", ALL)
def test_it_rounds_somehow(name):
    """On a grid, as a half, or with a grid of its own: a quantized type that says none of these is IQ1 to IQ3."""
    codec = CODECS[name]
    coded = codec.grid is not None or codec.half is not None
    assert coded or name == "F32" or name.startswith(("IQ1", "IQ2", "IQ3"))
    assert (codec.half is not None) is (name in HALVES)


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_is_what_decode_makes_of_the_codes(name):
    codec, stored = CODECS[name], blocks_of(name)
    grid = codec.grid
    codes, steps = np.empty((4, WIDTH), np.int8), np.empty((4, WIDTH // grid.group), np.float32)
    grid.unpack(stored, codes, steps)
    lows = np.zeros_like(steps)
    if grid.lows:
        grid.lows(stored, lows)
    units = (
        codes.astype(np.float32) - grid.zero if grid.levels is None else grid.levels[codes.astype(int) - grid.code_min]
    )
    spread = np.repeat(steps, grid.group, 1) * units - np.repeat(lows, grid.group, 1)
    assert np.allclose(spread, codec.decoded(stored), rtol=1e-5, atol=1e-7)
    wanted = np.random.default_rng(5).integers(grid.code_min, grid.code_max + 1, codes.shape).astype(np.int8)
    again = np.empty_like(codes)
    grid.pack(wanted, stored)
    grid.unpack(stored, again, steps)
    assert (again == wanted).all()
    assert grid.levels is None or len(grid.levels) == grid.code_max - grid.code_min + 1


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("MXFP4", "NVFP4")])
def test_auto_can_move_every_grid_whose_scale_is_an_f16(name):
    codec = CODECS[name]
    assert len(codec.scales_at) == (2 if codec.grid.lows else 1)


@pytest.mark.parametrize("name", [name for name in ALL if BY_NAME[name].block_size > 32])
def test_rows_that_are_no_whole_blocks_get_another_type(name):
    other = fallback_type(BY_NAME[name], 32)
    assert other.block_size == 32 or name in ("NVFP4", "Q1_0")
