"""What was made of the data: counts, and one sample in which trained tokens stand out."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from train.data.samples import Sample

# ANSI: trained text is green; the rest is left as it is.
TRAINED, PLAIN = "\x1b[32m", "\x1b[0m"


@dataclass
class SourceCount:
    """What one source gave. weight: its share of the rows of batches; None: every row once an
    epoch; sequences: rows of batches, known where the source has a weight."""

    rows: int
    samples: int
    tokens: int
    weight: float | None = None
    sequences: int | None = None


@dataclass
class DataReport:
    """Counts of one set of rows. tokens: of all samples; trained_tokens: those that are predicted
    and counted in the loss; dropped: rows or pieces left out, by reason; cut and split: rows that
    were too long and were kept in part or in pieces; packed_rows: rows of the batches, that is,
    sequences; padding_tokens: their places that hold no token; fill: the share that does."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_sample_tokens: int = 0
    cut: int = 0
    split: int = 0
    packed_rows: int = 0
    padding_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: dict[str, SourceCount] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.tokens += len(sample.ids)
        self.trained_tokens += int(sample.mask[1:].sum())
        self.longest_sample_tokens = max(self.longest_sample_tokens, len(sample.ids))

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def arranged(self, num_rows: int, row_tokens: int) -> None:
        """Told once samples lie in rows of `row_tokens` places."""
        self.packed_rows = num_rows
        self.padding_tokens = num_rows * row_tokens - self.tokens

    @property
    def fill(self) -> float:
        """The share of places that hold a token; 0 without rows."""
        return self.tokens / max(self.tokens + self.padding_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dropped": dict(self.dropped), "fill": round(self.fill, 4)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """That of which `to_dict` gave the values."""
        values = {key: value for key, value in values.items() if key != "fill"}
        values["dropped"] = Counter(values["dropped"])
        values["sources"] = {n: SourceCount(**count) for n, count in values["sources"].items()}
        return cls(**values)

    def lines(self, name: str) -> list[str]:
        """For a person, one fact a line."""
        share = self.trained_tokens / max(self.tokens, 1)
        result = [
            f"{name}: {self.rows} rows, {self.samples} samples in {self.packed_rows} sequences, "
            f"{self.tokens} tokens, of which {self.trained_tokens} are trained ({share:.0%}); "
            f"the longest sample has {self.longest_sample_tokens}",
            f"{name}: sequences are filled to {self.fill:.1%}; {self.padding_tokens} places are "
            f"padding",
        ]
        result += [f"{name}: {n} left out: {reason}" for reason, n in self.dropped.items()]
        if self.cut:
            result.append(f"{name}: {self.cut} rows cut off at the end")
        if self.split:
            result.append(f"{name}: {self.split} texts split into pieces")
        if len(self.sources) > 1:
            for source, count in self.sources.items():
                weight = "" if count.weight is None else f", weight {count.weight:g}"
                result.append(
                    f"{name}: from {source}: {count.rows} rows, {count.samples} samples, "
                    f"{count.tokens} tokens{weight}"
                )
        return result


def spans(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The sample as text in runs of (text, trained), control tokens shown.

    Each run is decoded on its own; a character whose bytes lie on both sides of a border cannot be
    shown, which no template makes.
    """
    trained = sample.mask.astype(bool).copy()
    trained[:1] = False  # the first token follows nothing, so it is never predicted
    runs: list[tuple[str, bool]] = []
    start = 0
    for place in range(1, len(trained) + 1):
        if place == len(trained) or trained[place] != trained[start]:
            ids = sample.ids[start:place].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False)
            runs.append((text, bool(trained[start])))
            start = place
    return runs


def colored(sample: Sample, tokenizer: Any, *, ansi: bool) -> str:
    """The sample's text with trained runs green on a terminal, in 【brackets】 elsewhere."""
    before, after = (TRAINED, PLAIN) if ansi else ("【", "】")
    return "".join(
        f"{before}{text}{after}" if is_trained else text
        for text, is_trained in spans(sample, tokenizer)
    )
