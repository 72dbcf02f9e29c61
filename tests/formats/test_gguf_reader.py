"""GGUF files read: hostile headers (R118), and every block format against the gguf package."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_jax.formats.gguf_header import GGUFError, is_readable, shortest_float
from llama_jax.formats.gguf_reader import GGUFFile
from llama_jax.formats.meta_layout import meta_to_hf
from tests.formats.gguf_files import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    gguf_bytes,
    string_entry,
    tensor,
    text,
    uint32_entry,
)

HUGE_STRING = struct.pack("<Q", 2**60)
ONE = [tensor("w", [32])]
DATA = bytes(128)

HOSTILE = {
    "2^40 tensors": (gguf_bytes([], [], num_tensors=2**40), "number of tensors"),
    "2^40 keys": (gguf_bytes([], [], num_entries=2**40), "number of metadata entries"),
    "2^64-1 tensors": (gguf_bytes([], [], num_tensors=2**64 - 1), "number of tensors"),
    "one tensor too many": (gguf_bytes([], ONE, DATA, num_tensors=2), "tensor 1: is empty"),
    "one key too many": (
        gguf_bytes([string_entry("a", "x" * 40)], [], num_entries=2),
        "1: is empty",
    ),
    "key of 2^60 bytes": (gguf_bytes([HUGE_STRING + bytes(40)], []), "key of metadata entry 0"),
    "string of 2^60 bytes": (
        gguf_bytes([text("note") + struct.pack("<I", STRING) + HUGE_STRING], []),
        "note",
    ),
    "string past the end": (
        gguf_bytes([text("note") + struct.pack("<IQ", STRING, 500) + b"short"], []),
        "note",
    ),
    "tensor name of 2^60 bytes": (gguf_bytes([], [HUGE_STRING + bytes(40)]), "name of tensor 0"),
    "array of 2^60 numbers": (
        gguf_bytes([text("list") + struct.pack("<IIQ", ARRAY, INT32, 2**60)], []),
        "list",
    ),
    "array of a million missing strings": (
        gguf_bytes([text("list") + struct.pack("<IIQ", ARRAY, STRING, 10**6)], []),
        "list",
    ),
    "array with a string past the end": (
        gguf_bytes(
            [text("list") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + HUGE_STRING], []
        ),
        r"list\[1\]",
    ),
    "array of arrays": (
        gguf_bytes([text("list") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(12)], []),
        "list.*value type 9",
    ),
    "unknown value type": (gguf_bytes([text("a") + struct.pack("<I", 77) + bytes(8)], []), "a.*77"),
    "boolean of 2": (gguf_bytes([text("a") + struct.pack("<IB", BOOL, 2)], []), "a.*boolean"),
    "key that is not UTF-8": (gguf_bytes([text(b"\xff\xfe") + bytes(12)], []), "UTF-8"),
    "token that is not UTF-8": (
        gguf_bytes([text("t") + struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff")], []),
        r"t\[0\].*UTF-8",
    ),
    "the same key twice": (gguf_bytes([uint32_entry("a", 1)] * 2, []), "a: appears twice"),
    "the same tensor twice": (
        gguf_bytes([], [tensor("w", [32]), tensor("w", [32], offset=128)], bytes(256)),
        "'w': appears twice",
    ),
    "no dimensions": (gguf_bytes([], [tensor("w", [])], DATA), "'w'.*0 dimensions"),
    "2^31 dimensions": (
        gguf_bytes([], [text("w") + struct.pack("<I", 2**31) + bytes(64)]),
        "'w'.*2147483648 dimensions",
    ),
    "five dimensions": (gguf_bytes([], [tensor("w", [2] * 5)], DATA), "'w'.*5 dimensions"),
    "an empty dimension": (gguf_bytes([], [tensor("w", [0, 32])], DATA), "'w'.*shape"),
    "a product that wraps to 0": (
        gguf_bytes([], [tensor("w", [2**32, 2**32])], DATA),
        "'w'.*shape",
    ),
    "a product that wraps to 32": (
        gguf_bytes([], [tensor("w", [2**62 + 8, 4])], DATA),
        "'w'.*shape",
    ),
    "a size that wraps when padded": (
        gguf_bytes([], [tensor("w", [2**61 - 1])], DATA),
        "'w'.*ends at byte",
    ),
    "an offset that wraps when added": (
        gguf_bytes([], [tensor("w", [32], offset=2**64 - 32)], DATA),
        "'w'.*ends at byte",
    ),
    "an unaligned offset": (gguf_bytes([], [tensor("w", [16], offset=4)], DATA), "'w'.*aligned"),
    "overlapping tensors": (
        gguf_bytes([], [tensor("v", [32]), tensor("w", [8], offset=64)], DATA),
        "'w'.*overlaps",
    ),
    "data cut short": (gguf_bytes([], ONE, bytes(127)), "'w'.*cut short"),
    "a row that is no whole block": (gguf_bytes([], [tensor("w", [31, 32], 8)], DATA), "'w'.*Q8_0"),
    "a tensor type that does not exist": (
        gguf_bytes([], [tensor("w", [32], 999)], DATA),
        "'w'.*999",
    ),
    "a removed tensor type": (gguf_bytes([], [tensor("w", [32], 4)], DATA), "'w'.*type 4"),
    "a type that cannot be decoded": (gguf_bytes([], [tensor("w", [32], 24)], DATA), "'w'.*I8"),
    "alignment 0": (gguf_bytes([uint32_entry("general.alignment", 0)], []), "general.alignment"),
    "alignment 48": (gguf_bytes([uint32_entry("general.alignment", 48)], []), "general.alignment"),
    "alignment 2^31": (
        gguf_bytes([uint32_entry("general.alignment", 2**31)], ONE, DATA),
        "'w'.*ends at byte",
    ),
    "alignment that is text": (
        gguf_bytes([string_entry("general.alignment", "32")], []),
        "general.alignment",
    ),
    "wrong magic": (gguf_bytes([], [], magic=b"GGML"), "magic"),
    "version 1": (gguf_bytes([], [], version=1), "version.*is 1"),
    "version 4": (gguf_bytes([], [], version=4), "version.*is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "empty": (b"", "too short"),
    "only the magic": (b"GGUF", "too short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_error_at_once_r118(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(GGUFError, match=message) as error:
            GGUFFile(path)
        seconds = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert seconds < 1
    assert peak < 1 << 20


def test_every_truncation_of_a_file_is_an_error(tmp_path):
    entries = [
        string_entry("name", "abc"),
        text("list") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text("bc"),
        text("numbers") + struct.pack("<IIQ3i", ARRAY, INT32, 3, 1, -2, 3),
        text("eps") + struct.pack("<If", FLOAT32, 1e-5),
    ]
    content = gguf_bytes(entries, [tensor("w", [4, 2])], struct.pack("<8f", *range(8)))
    path = tmp_path / "cut.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(GGUFError):
            GGUFFile(path)
    path.write_bytes(content)
    file = GGUFFile(path)
    assert file.metadata["list"] == ["a", "bc"]
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    assert file.metadata["eps"] == 1e-5
    assert file.tensors["w"].shape == (2, 4)
    out = np.empty((2, 4), np.float32)
    file.read("w", out, rows=slice(0, 2), columns=slice(0, 4))
    assert out.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    entries = [string_entry("name", "abc"), uint32_entry("general.alignment", 32)]
    content = gguf_bytes(entries, [tensor("w", [32]), tensor("v", [32], 8, 128)], bytes(256))
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    for _ in range(600):
        damaged = bytearray(content)
        for position in rng.integers(4, len(content) - 256, 2):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except GGUFError:
            continue


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GGUFError, match=r"absent\.gguf is not a file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(GGUFError, match="is not a file"):
        GGUFFile(tmp_path)


def test_another_alignment_is_followed(tmp_path):
    path = tmp_path / "aligned.gguf"
    entries = [uint32_entry("general.alignment", 256)]
    tensors = [tensor("v", [2]), tensor("w", [2], offset=256)]
    data = struct.pack("<2f", 1, 2) + bytes(248) + struct.pack("<2f", 3, 4)
    path.write_bytes(gguf_bytes(entries, tensors, data, alignment=256))
    out = np.empty((1, 2), np.float32)
    GGUFFile(path).read("w", out, rows=slice(0, 1), columns=slice(0, 2))
    assert out.tolist() == [[3, 4]]


READABLE = [kind for kind in GGMLQuantizationType if is_readable(kind)]


def test_the_readable_types_are_those_the_package_decodes():
    names = {kind.name for kind in READABLE}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= names
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0", "MXFP4"} <= names
    assert not {"I8", "I32", "F64", "Q8_K"} & names


def _random_blocks(kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """Bytes whose decoded values are finite: halves and floats below 2."""
    rng = np.random.default_rng(int(kind))
    if kind == GGMLQuantizationType.F32:
        return rng.normal(size=(rows, blocks)).astype(np.float32).view(np.uint8)
    raw = rng.integers(0, 256, (rows, blocks * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    return raw & 0x3F


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_decodes_as_the_package_does(kind, tmp_path):
    per_block = GGML_QUANT_SIZES[kind][0]
    rows, blocks = 24, max(3, 96 // per_block)
    raw = _random_blocks(kind, rows, blocks)
    expected = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(expected).all() and expected.any()
    path = tmp_path / "model.gguf"
    columns = blocks * per_block
    path.write_bytes(gguf_bytes([], [tensor("w", [columns, rows], kind)], raw.tobytes()))
    file = GGUFFile(path)
    out = np.empty((rows, columns), np.float32)
    file.read("w", out, rows=slice(0, rows), columns=slice(0, columns))
    np.testing.assert_array_equal(out, expected)
    # A part whose bounds fall inside blocks and heads, in Hugging Face's order of rows.
    part = np.empty((11, columns - 12), np.float32)
    file.read("w", part, rows=slice(3, 14), columns=slice(5, columns - 7), head_rows=8)
    np.testing.assert_array_equal(part, meta_to_hf(expected, 3)[3:14, 5 : columns - 7])


def test_reading_in_many_pieces_changes_nothing(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(48, 40)).astype(np.float32)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([], [tensor("w", [40, 48])], values.tobytes()))
    monkeypatch.setattr("llama_jax.formats.gguf_reader.CHUNK_ELEMENTS", 100)
    out = np.empty((41, 33), np.float32)
    GGUFFile(path).read("w", out, rows=slice(5, 46), columns=slice(7, 40), head_rows=6)
    np.testing.assert_array_equal(out, meta_to_hf(values, 8)[5:46, 7:])


@pytest.mark.parametrize("value", [1e-5, 1e-6, 10000.0, 500000.0, 0.1, 3.0, 1e30])
def test_a_float32_becomes_its_shortest_decimal(value):
    assert shortest_float(float(np.float32(value))) == value


def test_reading_allocates_a_constant_and_not_the_tensor(tmp_path):
    rows, columns = 4096, 1024
    raw = np.zeros((rows, columns // 32 * 34), np.uint8)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([], [tensor("w", [columns, rows], 8)], raw.tobytes()))
    file = GGUFFile(path)
    out = np.empty((rows, columns), np.float32)  # 16 MiB
    tracemalloc.start()
    try:
        file.read("w", out, rows=slice(0, rows), columns=slice(0, columns), head_rows=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    assert not out.any()
