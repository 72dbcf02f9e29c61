"""Samples: token ids with a 0/1 mask of the trained ones, held compactly."""

import hashlib
import io
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.model.losses import Batch

_IDS, _MASKS, _ENDS, _FINGERPRINT = "ids.bin", "masks.bin", "ends.npy", "fingerprint"


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
        ids, masks = io.BytesIO(), io.BytesIO()
        self._ends, self.fingerprint = _write(samples, ids, masks)
        self._ids = np.frombuffer(ids.getbuffer(), np.int32)
        self._masks = np.frombuffer(masks.getbuffer(), np.uint8)

    @classmethod
    def stored(cls, samples: Iterable[Sample], folder: Path) -> "Samples":
        """Written to files in `folder` one by one, then read from there: never all in memory."""
        folder.mkdir(parents=True)
        with (folder / _IDS).open("wb") as ids, (folder / _MASKS).open("wb") as masks:
            ends, fingerprint = _write(samples, ids, masks)
        np.save(folder / _ENDS, ends)
        (folder / _FINGERPRINT).write_text(fingerprint, encoding="ascii")
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "Samples":
        """Those that `stored` wrote; read when they are asked for."""
        self = cls.__new__(cls)
        self._ends = np.load(folder / _ENDS)
        self.fingerprint = (folder / _FINGERPRINT).read_text(encoding="ascii")
        tokens = int(self._ends[-1])
        self._ids = _mapped(folder / _IDS, np.int32, tokens)
        self._masks = _mapped(folder / _MASKS, np.uint8, tokens)
        return self

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


def _write(samples: Iterable[Sample], ids: BinaryIO, masks: BinaryIO) -> tuple[np.ndarray, str]:
    """Where each sample ends, and the hash of all."""
    ends, digest = array("q", [0]), hashlib.sha256()
    for sample in samples:
        parts = (sample.ids.astype(np.int32).tobytes(), sample.mask.astype(np.uint8).tobytes())
        for part, file in zip(parts, (ids, masks), strict=True):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
            file.write(part)
        ends.append(ends[-1] + len(sample.ids))
    return np.frombuffer(ends, np.int64), digest.hexdigest()


def _mapped(path: Path, dtype: Any, count: int) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


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
