"""Samples: token ids with a 0/1 mask of the trained ones, held compactly."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.model.losses import Batch


@dataclass(frozen=True)
class Sample:
    """ids: [n] int32; mask: [n] 0/1, 1 where the token is trained, that is, predicted."""

    ids: np.ndarray
    mask: np.ndarray


class Samples(Sequence[Sample]):
    """Many samples end to end in three arrays, five bytes a token: objects would not fit.

    fingerprint: a hash of all of them, in their order.
    """

    def __init__(self, samples: Iterable[Sample]):
        ids, masks, ends = array("i"), bytearray(), array("q", [0])
        digest = hashlib.sha256()
        for sample in samples:
            for part in (sample.ids.astype("<i4").tobytes(), sample.mask.tobytes()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            ids.frombytes(sample.ids.tobytes())
            masks += sample.mask.tobytes()
            ends.append(len(ids))
        self._ids = np.frombuffer(ids, np.int32)
        self._masks = np.frombuffer(masks, np.uint8)
        self._ends = np.frombuffer(ends, np.int64)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        part = slice(self._ends[index], self._ends[index + 1])
        return Sample(self._ids[part], self._masks[part])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._ends)


def make_sample(ids: Sequence[int], mask: Sequence[int]) -> Sample:
    return Sample(np.asarray(ids, np.int32), np.asarray(mask, np.uint8))


def make_row(samples: Sequence[Sample], length: int, *, pad_token_id: int) -> Batch:
    """One row [length] that holds the samples side by side, each a segment of its own.

    Position i is scored against the id at i + 1 of the same sample; the last token of a sample is
    scored against nothing. What is padding is told by length, never by id: an end token that
    happens to be the padding id counts like any other.
    """
    tokens = np.full(length, pad_token_id, np.int32)
    targets = np.full(length, pad_token_id, np.int32)
    loss_mask = np.zeros(length, np.float32)
    segment_ids = np.zeros(length, np.int32)
    positions = np.zeros(length, np.int32)
    start = 0
    for number, sample in enumerate(samples, start=1):
        size = len(sample.ids)
        end = start + size
        if end > length:
            raise ValueError(f"samples of {end} tokens do not fit a row of {length}")
        tokens[start:end] = sample.ids
        targets[start : end - 1] = sample.ids[1:]
        loss_mask[start : end - 1] = sample.mask[1:]
        segment_ids[start:end] = number
        positions[start:end] = np.arange(size)
        start = end
    return Batch(tokens, targets, loss_mask, segment_ids, positions)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows [T] -> a batch [B, T]."""
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    return Batch(**{name: np.stack([getattr(row, name) for row in rows]) for name in names})
