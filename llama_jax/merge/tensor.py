"""One merged tensor: a few rows of every input at a time, the result held whole for the writer."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_jax.formats.safetensors import TensorSpec, convert
from llama_jax.merge.sources import Source
from llama_jax.weights.merge import Rows, make_combine, widest
from llama_jax.weights.merge_recipe import Recipe
from llama_jax.weights.table import Weight

# Values of one input that are looked at together.
_CHUNK_VALUES = 4 << 20


def merged_tensor(
    recipe: Recipe,
    sources: list[Source],
    spec: TensorSpec,
    place: tuple[Weight, tuple[int, ...]],
    shared: np.ndarray | None,
) -> np.ndarray:
    row, at = place
    out = np.empty(spec.shape, spec.dtype)
    kinds = [source.stored(row, spec.name, at) for source in sources]
    wide = widest(kinds)
    merged_rows = len(out)
    if shared is not None and "vocab" in row.axes:
        merged_rows = int(np.flatnonzero(shared)[-1]) + 1 if shared.any() else 0
    step = max(1, _CHUNK_VALUES // max(1, out[:1].size))

    def read(source: Source, low: int, high: int, dtype: Any) -> np.ndarray:
        return source.rows(row, spec.name, at, (low, high), dtype)

    def passes() -> Iterator[Rows]:
        for low in range(0, merged_rows, step):
            high = min(low + step, merged_rows)
            yield [read(source, low, high, wide) for source in sources]

    combine = make_combine(recipe, passes, spec.name)
    low = 0
    for rows in passes():
        high = low + len(rows[0])
        out[low:high] = convert(combine(rows), spec.dtype, name=spec.name)
        if shared is not None and "vocab" in row.axes:
            kept = np.flatnonzero(~shared[low:high])
            own = read(sources[0], low, high, kinds[0])
            out[low:high][kept] = convert(own[kept], spec.dtype, name=spec.name)
        low = high
    for low in range(merged_rows, len(out), step):
        own = read(sources[0], low, min(low + step, len(out)), kinds[0])
        out[low : low + step] = convert(own, spec.dtype, name=spec.name)
    return out
