"""Matrices packed into panels, and out of them again."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.matrices.ggml import block_dtype, is_finite
from shuteye.matrices.kinds import BF16, KINDS, kind_of
from shuteye.matrices.packing import pack_bf16, pack_blocks, pack_groups, unpack, unpack_bf16, unpack_rows

BLOCK_KINDS = tuple(name for name in KINDS if name not in ("rows", "bf16"))
GROUP_KINDS = (
    "int4_g32_f16",
    "int4_g128_bf16_zeros",
    "int4_row_f32",
    "int4_g64_f16_zeros",
    "int8_row_f32",
    "int8_g32_bf16",
)


def some_blocks(name: str, *, rows: int, columns: int, seed: int) -> np.ndarray:
    """Blocks of arbitrary bytes, as in a GGUF file, whose scales are finite: extreme, subnormal and zero ones too."""
    random = np.random.default_rng(seed)
    kind = kind_of(name)
    blocks = random.integers(0, 256, (rows, columns // kind.block_columns * block_dtype(name).itemsize), np.uint8)
    typed = blocks.view(block_dtype(name))
    for field in ("d", "m"):
        if field in (typed.dtype.names or ()):
            scales = typed[field].view(np.float16)
            scales[~np.isfinite(scales)] = 65504
    return blocks


@pytest.mark.parametrize("name", BLOCK_KINDS)
def test_a_block_has_the_bytes_that_ggml_says(name):
    """A field too many or too few in a block would shift everything behind it."""
    columns, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert (kind_of(name).block_columns, block_dtype(name).itemsize) == (columns, nbytes)


@pytest.mark.parametrize("name", BLOCK_KINDS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 50), blocks=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_packed_blocks_stand_for_what_the_file_says(name, rows, blocks, seed):
    """A bit in the wrong place, or another order of operations: weights that differ from everyone else's."""
    kind = kind_of(name)
    columns = blocks * kind.block_columns
    stored = some_blocks(name, rows=rows, columns=columns, seed=seed)
    memory = pack_blocks(kind, stored)
    assert memory.nbytes == kind.nbytes((rows, columns), "bfloat16")
    expected = dequantize(stored, GGMLQuantizationType[name.upper()])
    assert np.array_equal(unpack(kind, memory, rows, columns).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_KINDS)
def test_rows_that_do_not_exist_weigh_nothing(name):
    """Kernels compute whole panels: what fills the last one must be finite, and zero."""
    kind = kind_of(name)
    columns = 2 * kind.block_columns
    memory = pack_blocks(kind, some_blocks(name, rows=17, columns=columns, seed=1))
    assert not unpack(kind, memory, 32, columns)[17:].any()


def test_a_panel_of_q4_k_byte_by_byte():
    """Kernels read these bytes; `unpack` alone would not notice an order that both directions share."""
    kind, columns = kind_of("q4_k"), 256
    stored = some_blocks("q4_k", rows=16, columns=columns, seed=2)
    memory = pack_blocks(kind, stored)
    typed = stored.view(block_dtype("q4_k"))[:, 0]
    assert memory[:32].tobytes() == typed["d"].tobytes()
    assert memory[32:64].tobytes() == typed["m"].tobytes()
    unit = memory[64 + 5 * (32 + 256) :]
    u = np.stack([typed["q"][:, 64:96] >> 4])[0]  # unit 5: high nibbles of the third strip of 32 bytes
    for p in range(4):
        for r in range(16):
            for c in range(4):
                byte = u[r, 4 * p + c] | u[r, 4 * (p + 4) + c] << 4
                assert unit[32 + 64 * p + 4 * r + c] == byte


def test_planes_of_two_bits_and_of_one_byte_by_byte():
    """As above, for the planes of q3_k: u of each weight, from memory as the contract of the kernels says."""
    kind, columns = kind_of("q3_k"), 256
    stored = some_blocks("q3_k", rows=16, columns=columns, seed=3)
    memory = pack_blocks(kind, stored)
    typed = stored.view(block_dtype("q3_k"))[:, 0]
    unit = memory[32 + 6 * (32 + 128 + 64) :][32:]  # unit 6: strip 1, bits 4 and 5; bit 6 of the masks
    words = unit[128:192].view(np.uint64)
    for r in range(16):
        for k in range(32):
            j, byte = k // 4, 4 * r + k % 4
            u = unit[64 * (j // 4) + byte] >> 2 * (j % 4) & 3 | (int(words[j]) >> byte & 1) << 2
            assert u == (typed["q"][r, 32 + k] >> 4 & 3 | (typed["high"][r, k] >> 6 & 1) << 2)


@pytest.mark.parametrize("name", ["q8_0", "q5_k", "bf16", "int4_g32_f16_zeros"])
def test_single_rows_are_those_of_the_matrix(name):
    """An embedding of another token."""
    kind, rows, columns = kind_of(name), 77, 512
    memory = some_matrix(name, rows=rows, columns=columns)
    indices = np.array([76, 0, 31, 32, 0, 15])
    whole = unpack(kind, memory, rows, columns)
    assert np.array_equal(unpack_rows(kind, memory, rows, columns, indices), whole[indices])


def some_matrix(name: str, *, rows: int, columns: int) -> np.ndarray:
    random = np.random.default_rng(4)
    if name == "bf16":
        return pack_bf16(random.integers(0, 0x7F80, (rows, columns), np.uint16))
    if name in BLOCK_KINDS:
        return pack_blocks(kind_of(name), some_blocks(name, rows=rows, columns=columns, seed=5))
    return pack_groups(kind_of(name), *some_groups(name, rows=rows, columns=columns, random=random))


def some_groups(name, *, rows, columns, random):
    kind = kind_of(name)
    top = 16 if name.startswith("int4") else 256
    u = random.integers(0, top, (rows, columns), np.uint8)
    scales = random.normal(size=(rows, columns // (kind.group or columns))).astype(np.float32)
    stored = {"f32": scales, "f16": scales.astype(np.float16), "bf16": (scales.view(np.uint32) >> 16).astype(np.uint16)}
    zeros = random.integers(0, 17, scales.shape, np.uint8) if kind.has_zeros else None
    return u, stored[kind.scale_dtype], zeros


@pytest.mark.parametrize("name", GROUP_KINDS)
@pytest.mark.parametrize("rows", [1, 16, 45])
def test_packed_groups_are_scaled_integers(name, rows):
    """A scale of another group, a zero point taken for another's, an offset of one."""
    kind, columns = kind_of(name), 384
    u, scales, zeros = some_groups(name, rows=rows, columns=columns, random=np.random.default_rng(6))
    memory = pack_groups(kind, u, scales, zeros)
    assert memory.nbytes == kind.nbytes((rows, columns), "bfloat16")
    group = kind.group or columns
    wide = (
        (scales.astype(np.uint32) << 16).view(np.float32) if kind.scale_dtype == "bf16" else scales.astype(np.float32)
    )
    zero = (
        (8 if name.startswith("int4") else 128) if zeros is None else np.repeat(zeros, group, axis=1).astype(np.float32)
    )
    expected = np.repeat(wide, group, axis=1) * (u.astype(np.float32) - zero)
    assert np.array_equal(unpack(kind, memory, rows, columns), expected)
    assert not unpack(kind, memory, -(-rows // 16) * 16, columns)[rows:].any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 32), (33, 31), (70, 66), (40, 576)])
def test_bfloat16_comes_back(rows, columns):
    """Rows or columns that do not fill a panel: lost, or not zero where kernels read on."""
    values = np.random.default_rng(7).integers(0, 2**16, (rows, columns), np.uint16)
    memory = pack_bf16(values)
    assert np.array_equal(unpack_bf16(memory, rows, columns), values)
    panels = memory.view(np.uint16).reshape(-(-rows // 32), -(-columns // 32) * 16, 32, 2)
    assert panels[(rows - 1) // 32, (columns - 1) // 2, (rows - 1) % 32, (columns - 1) % 2] == values[-1, -1]
    rest = unpack_bf16(memory, -(-rows // 32) * 32, -(-columns // 32) * 32)
    assert not rest[rows:].any()
    assert not rest[:, columns:].any()


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "bf16"])
def test_pieces_of_rows_follow_one_another(name):
    """Large matrices are packed in pieces: a piece must not depend on what was packed before."""
    kind, columns = kind_of(name), 256
    if kind is BF16:
        rows = np.random.default_rng(8).integers(0, 2**16, (96, columns), np.uint16)
        pack = pack_bf16
    else:
        rows = some_blocks(name, rows=96, columns=columns, seed=9)
        pack = lambda part: pack_blocks(kind, part)  # noqa: E731
    assert np.array_equal(np.concatenate([pack(rows[:32]), pack(rows[32:])]), pack(rows))


def test_permuted_rows_are_packed_as_they_are_seen():
    """Query and key rows of llama files are permuted views: packing what lies behind them would mix up heads."""
    stored = some_blocks("q5_0", rows=64, columns=64, seed=10)
    permuted = stored.reshape(2, 2, 16, -1).swapaxes(1, 2).reshape(64, -1)
    order = np.arange(64).reshape(2, 2, 16).swapaxes(1, 2).reshape(-1)
    kind = kind_of("q5_0")
    found = unpack(kind, pack_blocks(kind, permuted), 64, 64)
    assert np.array_equal(found, unpack(kind, pack_blocks(kind, stored), 64, 64)[order])


@pytest.mark.parametrize(("field", "bits"), [("d", 0x7C00), ("m", 0xFE00)])
def test_scales_that_are_no_numbers_are_seen(field, bits):
    """An infinite scale makes every logit NaN, long after the file was read."""
    stored = some_blocks("q4_k", rows=3, columns=512, seed=11)
    assert is_finite("q4_k", stored)
    stored.view(block_dtype("q4_k"))[field][2, 1] = bits
    assert not is_finite("q4_k", stored)
