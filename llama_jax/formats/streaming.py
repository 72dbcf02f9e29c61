"""Weights on their way to where they will lie: on devices, or in a checkpoint.

They may be quantized on the way, and the full-precision model never exists: what is read at one
time is one layer of one weight, or for a checkpoint a piece of it; its buffer is free before the
next is read. (A weight that comes from a checkpoint is read with all its layers.)
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import tree
from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.formats.checkpoint_arrays import PieceWriter
from llama_jax.formats.placement import Read, place
from llama_jax.mesh.sharding import shardings
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.table import Weight

# `read_array(name, out, index)`: `Read` of one array of a quantized leaf, such as `scale`.
ReadArray = Callable[[str, np.ndarray, tuple[slice, ...]], None]
# (config, shape structs of the weights) -> what puts them where they will lie.
Into = Callable[[ModelConfig, tree.Tree], "Placer | DiskPlacer"]


class Placer:
    """Puts the weights of a model, as `abstract` describes them, on a mesh (None: the default
    device), those that `quantization` chooses as quantized leaves."""

    def __init__(
        self,
        config: ModelConfig,
        abstract: tree.Tree,
        *,
        mesh: Mesh | None,
        rules: LogicalRules,
        quantization: Quantization | None,
    ):
        self._structs = tree.flatten(abstract)
        self._how = quantization
        self._chosen: set[str] = set()
        after = abstract
        if quantization is not None:
            self._chosen = quantization.chosen(config, abstract)
            after = abstract_quantized(config, abstract, quantization)
        self._after = tree.flatten(after)
        self._places: dict[str, Any] = dict.fromkeys(self._structs)
        self._plain_places: dict[str, NamedSharding | None] = dict.fromkeys(self._structs)
        if mesh is not None:
            self._places = tree.flatten(shardings(config, after, mesh, rules))
            self._plain_places = tree.flatten(shardings(config, abstract, mesh, rules))

    def place(self, row: Weight, read: Read) -> Leaf:
        """The leaf of a row of the weight table, whose values `read` gives; see `placement`."""
        struct, where = self._structs[row.path], self._plain_places[row.path]
        dtype = np.dtype(struct.dtype)
        if row.path not in self._chosen or not row.path.startswith("layers."):
            return self.finish(row.path, place(row.shape, dtype, read, where))
        assert self._how is not None
        if where is not None:
            where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        leaf, write = self._empty(row.path)
        for layer in range(row.shape[0]):
            array = place(row.shape[1:], dtype, functools.partial(_read_layer, read, layer), where)
            part = self._how.apply(f"layer {layer} of {row.path}", array)
            array.delete()
            leaf = write(leaf, part, jnp.int32(layer))
            jax.block_until_ready(leaf)
        return leaf

    def place_quantized(self, row: Weight, read_array: ReadArray) -> Leaf:
        """The leaf of a weight that is stored quantized, array by array."""
        where = self._places[row.path]
        places = {} if where is None else tree.flatten_arrays(where)

        def placed(name: str, struct: Any) -> jax.Array:
            read = functools.partial(read_array, _array_name(name))
            return place(struct.shape, np.dtype(struct.dtype), read, places.get(name))

        return tree.map_arrays_with_path(placed, self._structs[row.path])

    def finish(self, path: str, leaf: Leaf) -> Leaf:
        """What a whole weight, read and placed, becomes; it is used up."""
        if path not in self._chosen:
            return leaf
        assert self._how is not None
        quantized = self._how.apply(path, leaf)
        leaf.delete()
        where = self._places[path]
        return quantized if where is None else jax.device_put(quantized, where)

    def _empty(self, path: str) -> tuple[Leaf, Any]:
        """A leaf of zeros for all layers, and what puts one layer into it."""
        where = {} if self._places[path] is None else {"out_shardings": self._places[path]}
        struct = self._after[path]

        def zeros() -> Leaf:
            return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), struct)

        def write(leaf: Leaf, part: Leaf, layer: jax.Array) -> Leaf:
            return jax.tree.map(
                lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, layer, 0),
                leaf,
                part,
            )

        return jax.jit(zeros, **where)(), jax.jit(write, donate_argnums=0, **where)


class DiskPlacer:
    """Writes the weights of a model to the group `folder` of a checkpoint, those that
    `quantization` chooses as quantized leaves; what it hands back is shape structs."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        abstract: tree.Tree,
        *,
        quantization: Quantization | None,
    ):
        self._how = quantization
        self._chosen: set[str] = set()
        self._structs = tree.flatten(abstract)
        after = abstract
        if quantization is not None:
            self._chosen = quantization.chosen(config, abstract)
            after = abstract_quantized(config, abstract, quantization)
        self._after = tree.flatten(after)
        self._rows = {path: _piece_rows(path, leaf) for path, leaf in self._structs.items()}
        structs = tree.flatten_arrays(after)
        pieces = {
            name: _piece_shape(struct.shape, path.startswith("layers."), self._rows[path])
            for path, leaf in self._after.items()
            for name, struct in tree.flatten_arrays(tree.unflatten({path: leaf})).items()
        }
        self._writer = PieceWriter(folder, structs, pieces)

    def place(self, row: Weight, read: Read) -> Leaf:
        """Reads the weight of a row of the weight table, and writes it, piece by piece."""
        self._pieces(row.path, read)
        return self._after[row.path]

    def place_quantized(self, row: Weight, read_array: ReadArray) -> Leaf:
        """Writes a weight that is stored quantized, as it is, array by array."""
        leaf, step = self._after[row.path], self._rows[row.path]
        for name, struct in tree.flatten_arrays(tree.unflatten({row.path: leaf})).items():
            for index in _pieces_of(struct.shape, row.path.startswith("layers."), step):
                values = np.empty([part.stop - part.start for part in index], struct.dtype)
                read_array(_array_name(name), values, index)
                self._writer.write(name, index, values)
        return leaf

    def _pieces(self, path: str, read: Read) -> None:
        struct = self._structs[path]
        stacked = path.startswith("layers.")
        inner = struct.shape[1:] if stacked else struct.shape
        step = self._rows[path]
        for layer in range(struct.shape[0]) if stacked else (None,):
            for low in range(0, inner[0], step):
                rows = slice(low, min(low + step, inner[0]))
                index = (rows, *(slice(0, size) for size in inner[1:]))
                shape = (rows.stop - rows.start, *inner[1:])
                if layer is None:
                    part = functools.partial(_read_part, read, index)
                else:
                    part = functools.partial(_read_part, read, (slice(layer, layer + 1), *index))
                self._write(path, layer, rows, place(shape, np.dtype(struct.dtype), part, None))

    def _write(self, path: str, layer: int | None, rows: slice, array: jax.Array) -> None:
        leaf: Leaf = array
        if path in self._chosen:
            assert self._how is not None
            where = path if layer is None else f"layer {layer} of {path}"
            leaf = self._how.apply(where, array)
        for name, values in tree.flatten_arrays(tree.unflatten({path: leaf})).items():
            index = (rows,) if layer is None else (layer, rows)
            self._writer.write(name, index, np.asarray(values))

    def finish(self, path: str, leaf: Leaf) -> Leaf:
        """Writes a weight that was read whole; what is quantized or adapted goes as it is."""
        if path in self._chosen:

            def read(out: np.ndarray, index: tuple[slice, ...]) -> None:
                out[...] = np.asarray(leaf)[index]

            self._pieces(path, read)
        else:
            for name, values in tree.flatten_arrays(tree.unflatten({path: leaf})).items():
                self._writer.write(name, (slice(None),) * values.ndim, np.asarray(values))
        return self._after[path]


# What is read, quantized and written at one time.
_PIECE_BYTES = 32 << 20


def _piece_rows(path: str, leaf: Leaf) -> int:
    """How many entries of the first dimension (behind the layers) make a piece."""
    inner = leaf.shape[1:] if path.startswith("layers.") else leaf.shape
    if not inner:
        return 1
    size = 4 * math.prod(inner[1:])
    return min(max(_PIECE_BYTES // size, 1), inner[0])


def _piece_shape(shape: tuple[int, ...], stacked: bool, rows: int) -> tuple[int, ...]:
    if not shape:
        return ()
    if not stacked:
        return (min(rows, shape[0]), *shape[1:])
    return (1, *(min(rows, size) for size in shape[1:2]), *shape[2:])


def _pieces_of(shape: tuple[int, ...], stacked: bool, rows: int) -> Iterator[tuple[slice, ...]]:
    """The indices of pieces of so many entries, one layer after the other, of an array."""
    sizes = _piece_shape(shape, stacked, rows)
    for begin in itertools.product(*map(range, itertools.repeat(0), shape, sizes)):
        yield tuple(
            slice(low, min(low + step, size))
            for low, step, size in zip(begin, sizes, shape, strict=True)
        )


def _array_name(path: str) -> str:
    return path.rpartition(".")[2]


def _read_part(
    read: Read, where: tuple[slice, ...], out: np.ndarray, index: tuple[slice, ...]
) -> None:
    """`read` of the part `where` of a weight, of which `out` is the whole part; a leading layer is
    one that `out` does not have."""
    del index
    read(out[None] if len(where) > out.ndim else out, where)


def abstract_quantized(config: ModelConfig, abstract: tree.Tree, how: Quantization) -> tree.Tree:
    """What quantizing makes of a tree of shape structs."""

    return jax.eval_shape(lambda params: quantize(config, params, **vars(how)), abstract)


def _read_layer(read: Read, layer: int, out: np.ndarray, index: tuple[slice, ...]) -> None:
    """`read` of one layer of a stacked weight."""
    read(out[None], (slice(layer, layer + 1), *index))
