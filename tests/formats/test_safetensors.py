"""The safetensors reader refuses what is not whole; the writer's files are read by the library."""

import json
import math
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from llama_jax.formats import safetensors as st


def _file(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _refused(path, *words):
    begin = time.perf_counter()
    with pytest.raises(st.SafetensorsError) as error:
        st.SafetensorsFile(path)
    assert time.perf_counter() - begin < 1.0
    for word in (path.name, *words):
        assert word in str(error.value), (word, str(error.value))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, "size+1", "size", "size-7", 101 << 20])
def test_R114_declared_header_lengths(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    header = {"a": _entry()}
    size = 8 + len(json.dumps(header)) + 4
    number = size + int(length[4:] or 0) if isinstance(length, str) else length
    _file(path, header, b"\0" * 4, length=number)
    _refused(path, str(number))


def test_R114_header_limit_holds_for_a_file_that_is_large_enough(tmp_path):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 101 << 20) + b"{")
        file.truncate(200 << 20)
    _refused(path, str(101 << 20))


@pytest.mark.parametrize("content", [b"", b"\0", b"\x02\0\0\0\0\0\0"])
def test_files_shorter_than_the_length(tmp_path, content):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    _refused(path, "too short")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", ["start with"]),
        (b"{]", ["JSON"]),
        (b'{"a\xff": 1}', ["JSON"]),
        (b'{"a":' + b"[" * 100_000, ["JSON"]),
        (b'{"a":' + b"9" * 10_000 + b"}", ["JSON"]),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', ["twice"]),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            ["'a'", "twice"],
        ),
        ({"__metadata__": {"a": 1}}, ["__metadata__"]),
        ({"a": 3}, ["'a'"]),
        ({"a": {"dtype": "F32", "shape": [1]}}, ["'a'", "exactly"]),
        ({"a": {**_entry(), "stride": [1]}}, ["'a'", "exactly"]),
        ({"a": _entry(dtype="F4")}, ["'a'", "F4"]),
        ({"a": _entry(dtype=["F32"])}, ["'a'", "dtype"]),
        ({"a": _entry(shape=[-1])}, ["'a'", "shape"]),
        ({"a": _entry(shape=[1.0])}, ["'a'", "shape"]),
        ({"a": _entry(shape=[True])}, ["'a'", "shape"]),
        ({"a": _entry(shape=[1] * 65)}, ["'a'", "shape"]),
        ({"a": {**_entry(), "shape": "1"}}, ["'a'", "shape"]),
        ({"a": _entry(offsets=[4, 0])}, ["'a'", "data_offsets"]),
        ({"a": _entry(offsets=[0])}, ["'a'", "data_offsets"]),
        ({"a": _entry(offsets=[-4, 0])}, ["'a'", "data_offsets"]),
        ({"a": _entry(offsets=[0, 2**63])}, ["'a'", "data_offsets"]),
        ({"a": _entry(shape=[2**62, 2**62], offsets=[0, 4])}, ["'a'", "takes"]),
        ({"a": _entry(shape=[0], offsets=[0, 4])}, ["'a'", "takes 0"]),
        ({"a": _entry(), "b": _entry()}, ["'b'", "overlaps"]),
        ({"b": _entry(offsets=[4, 8])}, ["'b'", "hole"]),
        ({}, ["accounts for"]),
    ],
)
def test_R115_malformed_headers(tmp_path, header, words):
    path = _file(tmp_path / "bad.safetensors", header, b"\0" * 8)
    _refused(path, *words)


def test_R115_shape_and_range_disagree(tmp_path):
    path = _file(
        tmp_path / "a.safetensors", {"w": _entry(shape=[1000, 1000], offsets=[0, 4])}, b"\0" * 4
    )
    _refused(path, "'w'", "4000000")
    path = _file(
        tmp_path / "b.safetensors",
        {"w": _entry(shape=[1000, 1000], offsets=[0, 4_000_000])},
        b"\0" * 4,
    )
    _refused(path, "'w'", "4000000"[:4])


@pytest.mark.parametrize("change", [-1024, -1, 1, 1024])
def test_R16_length_must_match_exactly(tmp_path, change):
    path = tmp_path / "cut.safetensors"
    safetensors.numpy.save_file({"w": np.ones((64, 64), np.float32)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    _refused(path)


VALUES = {
    name: (np.arange(24) % 2).reshape(2, 3, 4).astype(dtype) for name, dtype in st.DTYPES.items()
}


def test_every_dtype_round_trips_through_file(tmp_path):
    path = tmp_path / "all.safetensors"
    st.write_arrays(path, VALUES, metadata={"format": "pt"})
    file = st.SafetensorsFile(path)
    assert file.header.metadata == {"format": "pt"}
    for name, value in VALUES.items():
        got = file.view(name)
        assert got.dtype == value.dtype
        assert got.tobytes() == value.tobytes()
        assert not got.flags.writeable


def test_library_reads_ours_and_we_read_the_library(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.integers(0, 255, 3).astype(np.uint8),
        "x": rng.normal(size=(5, 7)).astype(np.float32),
        "half": rng.normal(size=(3, 2)).astype(np.float16),
        "brain": rng.normal(size=(3, 2)).astype(ml_dtypes.bfloat16),
        "long": rng.integers(0, 9, (2, 2)),
        "double": rng.normal(size=(2,)),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    st.write_arrays(ours, arrays, metadata={"format": "pt"})
    read = safetensors.numpy.load_file(ours)
    assert set(read) == set(arrays)
    safetensors.numpy.save_file(arrays, theirs)
    mapped = st.SafetensorsFile(theirs)
    for name, value in arrays.items():
        assert read[name].tobytes() == value.tobytes() and read[name].shape == value.shape
        assert mapped.view(name).tobytes() == value.tobytes()
        assert mapped.view(name).shape == value.shape
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("x").numpy().tobytes() == arrays["x"].tobytes()


def test_R17_arrays_of_any_layout_are_written_in_c_order(tmp_path):
    kernel = np.array([[0, 1, 2], [3, 4, 5]], np.float32)
    wide = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "transposed": kernel.T,
        "fortran": np.asfortranarray(kernel),
        "strided": wide[:, ::2, ::-1],
        "moved": np.moveaxis(wide, 0, 2).astype(ml_dtypes.bfloat16, order="K"),
        "broadcast": np.broadcast_to(np.float32(7), (2, 2)),
    }
    path = tmp_path / "layout.safetensors"
    st.write_arrays(path, arrays)
    read = safetensors.numpy.load_file(path)
    assert read["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)


def test_writer_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"'s' is .*cannot hold"):
        st.write_arrays(path, {"s": np.array(["a"])})
    with pytest.raises(ValueError, match="announced"):
        st.write_file(
            path,
            [st.TensorSpec("w", np.dtype(np.float32), (2,))],
            lambda spec: np.zeros(3, np.float32),
        )
    with pytest.raises(ValueError, match="taken"):
        st.write_arrays(path, {"__metadata__": np.zeros(1)})
    twice = [st.TensorSpec("w", np.dtype(np.float32), (1,))] * 2
    with pytest.raises(ValueError, match="taken"):
        st.write_file(path, twice, lambda spec: np.zeros(1, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None)),
        (slice(3, 11), slice(None)),
        (slice(None), slice(2, 5)),
        (slice(5, 5), slice(0, 1)),
    ],
)
def test_copy_to_reads_slices_in_pieces(tmp_path, monkeypatch, dtype, index):
    monkeypatch.setattr(st, "_CHUNK_BYTES", 64)
    value = np.arange(13 * 6, dtype=np.float32).reshape(13, 6)
    path = tmp_path / "a.safetensors"
    st.write_arrays(path, {"pad": np.zeros(3, np.uint8), "w": value, "n": np.array(2, np.float32)})
    file = st.SafetensorsFile(path)
    out = np.empty(value[index].shape, dtype)
    file.copy_to(out, "w", index)
    np.testing.assert_array_equal(out, value[index].astype(dtype))
    scalar = np.empty((), dtype)
    file.copy_to(scalar, "n", ())
    assert scalar == 2


@pytest.mark.parametrize("index", [(slice(0, 13), slice(0, 24)), (slice(3, 11), slice(5, 9))])
def test_a_tensor_may_be_taken_for_its_bytes(tmp_path, monkeypatch, index):
    monkeypatch.setattr(st, "_CHUNK_BYTES", 64)
    value = np.arange(13 * 6, dtype="<i4").reshape(13, 6) * 77777
    path = tmp_path / "a.safetensors"
    st.write_arrays(path, {"pad": np.zeros(3, np.uint8), "w": value})
    wanted = value.view(np.uint8)[index]
    out = np.empty(wanted.shape, np.uint8)
    st.SafetensorsFile(path).copy_to(out, "w", index, as_bytes=True)
    np.testing.assert_array_equal(out, wanted)


def test_R19_shards_and_index(tmp_path):
    arrays = {f"t{i}": np.full((10,), i, np.float32) for i in range(7)}
    specs = [st.TensorSpec(n, a.dtype, a.shape) for n, a in arrays.items()]
    files = st.write_sharded(tmp_path, specs, lambda spec: arrays[spec.name], max_shard_bytes=120)
    assert [f.name for f in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 280
    assert sorted(index["weight_map"]) == sorted(arrays)
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(
            safetensors.numpy.load_file(tmp_path / file)[name], arrays[name]
        )


def test_a_tensor_larger_than_the_limit_has_its_own_shard():
    specs = [st.TensorSpec(str(n), np.dtype(np.int8), (n,)) for n in (1, 50, 2, 3)]
    assert [[s.name for s in shard] for shard in st.plan_shards(specs, 10)] == [
        ["1"],
        ["50"],
        ["2", "3"],
    ]
    with pytest.raises(ValueError, match="positive"):
        st.plan_shards(specs, 0)


def test_sizes_are_parsed():
    assert st.parse_bytes("5GB") == 5 * 10**9
    assert st.parse_bytes("2 GiB") == 2**31
    assert st.parse_bytes("1.5kb") == 1500
    assert st.parse_bytes("300") == 300
    assert st.parse_bytes(7) == 7
    for bad in (2.5, "", "GB", "-1GB", "0", "five", "1XB", "nan", "inf", 0, -3, True, math.nan):
        with pytest.raises(ValueError, match="is not a size"):
            st.parse_bytes(bad)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of pages")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_copying_hands_the_pages_of_the_file_back(tmp_path, dtype):
    path = tmp_path / "large.safetensors"
    st.write_arrays(path, {"w": np.ones((16, 1 << 20), np.float32)})  # 64 MiB
    file = st.SafetensorsFile(path)
    file.view("w").max()
    assert _resident_kib(path) > 60_000  # looking at all of it maps all of it
    out = np.empty((16, 1 << 20), dtype)
    file.copy_to(out, "w", (slice(0, 16), slice(0, 1 << 20)))
    assert _resident_kib(path) < 1_000
    assert (out == 1).all()


def _resident_kib(path):
    """Pages of the mapped file that count towards this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    total = 0
    for line in lines:
        if line.endswith(str(path)):
            total += next(int(entry.split()[1]) for entry in lines if entry.startswith("Rss:"))
    return total
