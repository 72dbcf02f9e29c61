"""The key `data` of a run config, and the sources it names."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from train.typed import Section, option


@dataclass(frozen=True)
class SourceSection(Section):
    """One source of rows, where a path alone does not say enough. Exactly one of path, tfds,
    datasets and array_record names it."""

    path: str | None = option(
        "files ending in .jsonl, .json, .csv or .parquet, also compressed: a path, a URL such as "
        "gs://bucket/rows-*.jsonl, a glob, or package: for a shipped one",
        default=None,
    )
    tfds: str | None = option(
        "a prepared TFDS data set in ArrayRecord files, such as my_rows or my_rows/config:1.0.0",
        default=None,
    )
    datasets: str | None = option(
        "a Hugging Face data set: a folder of save_to_disk, or what load_dataset takes",
        default=None,
    )
    array_record: str | None = option(
        "ArrayRecord files, or a glob, whose records are rows as JSON", default=None
    )
    split: str | None = option("of tfds and datasets, such as train or train[:10%]", default=None)
    config: str | None = option("the configuration of a Hugging Face data set", default=None)
    data_dir: str | None = option("where tfds or datasets find the data", default=None)
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "doc": "the column that each field of a row is read from, such as {text: article}; "
            "other columns are left unread. null: columns are named as fields, and there are no "
            "others"
        },
    )
    weight: float | None = option(
        "share of the batches' rows, relative to the other sources'; null everywhere: every row "
        "of every source once an epoch",
        default=None,
        above=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("path", "tfds", "datasets", "array_record")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a data source names {' and '.join(given) or 'nothing to read'}; give exactly one "
                f"of {', '.join(kinds)}"
            )
        reads = {"tfds": ("split", "data_dir"), "datasets": ("split", "config", "data_dir")}
        for name in ("split", "config", "data_dir"):
            if getattr(self, name) is not None and name not in reads.get(given[0], ()):
                raise ValueError(f"{name} of a data source is set, but {given[0]} does not read it")
        if self.tfds is not None and self.split is None:
            raise ValueError(f"the data source tfds {self.tfds} needs a split, for example train")
        if self.columns is not None and not self.columns:
            raise ValueError("columns of a data source is empty; name a column, or leave it out")

    def place(self) -> tuple[str, str]:
        """(kind, name) of what is read."""
        for kind in ("path", "tfds", "datasets", "array_record"):
            if (name := getattr(self, kind)) is not None:
                return kind, name
        raise AssertionError("a source names something")


@dataclass(frozen=True)
class DataSection(Section):
    """Rows: chat, instruction, text or preference. A source is a path (or URL, or glob) of files,
    `package:demo/train.jsonl` for a shipped one, or a mapping that says more."""

    train: tuple[str | SourceSection, ...] = option("sources of training rows")
    eval: tuple[str | SourceSection, ...] = option("sources of rows to evaluate on", default=())
    eval_fraction: float = option(
        "part of the training rows held out for evaluation instead", default=0.0, low=0.0, below=1.0
    )
    long_rows: Literal["drop", "cut", "refuse"] = option(
        "chat, instruction and preference rows beyond sequence_length: leave out and count, cut "
        "off the end (and leave out where no answer is left), or stop",
        default="drop",
    )
    long_texts: Literal["split", "drop", "cut", "refuse"] = option(
        "text rows beyond sequence_length: split into pieces that overlap by one token, leave out, "
        "cut off the end, or stop",
        default="split",
    )
    packing: bool = option("put several samples into one row, kept apart", default=False)
    template_date: str | None = option(
        "the day, as 2026-11-30, that a chat template with strftime_now is told, as that of Llama "
        "3.2. null: the day the run began, also when it goes on on another",
        default=None,
    )
    shuffle: bool = option("a new order every epoch, decided by train.seed", default=True)
    prefetch: int = option(
        "batches made ahead by threads while the devices work; 0: each when it is asked for",
        default=2,
        low=0,
    )
    num_workers: int = option("threads that make batches ahead", default=1, low=1, high=256)
    cache: str | None = option(
        "a local folder that keeps the tokenized rows, so that they need not fit in memory and the "
        "next start need not make them again; sources that changed are noticed. null: in memory",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers > 1 and not self.prefetch:
            raise ValueError(
                f"data.num_workers is {self.num_workers}, but data.prefetch is 0, so that no "
                f"thread makes batches ahead; set prefetch, or num_workers to 1"
            )
        if not self.train:
            raise ValueError("data.train is empty; name at least one source of rows")
        for name in ("train", "eval"):
            for number, entry in enumerate(getattr(self, name)):
                if isinstance(entry, str) and not entry.strip():
                    raise ValueError(f"data.{name}[{number}] is empty; name a source of rows")
        if self.template_date is not None:
            _check_date(self.template_date)
        if self.cache is not None and not self.cache.strip():
            raise ValueError("data.cache is empty; name a local folder, or set it to null")
        weighted = [isinstance(entry, SourceSection) and bool(entry.weight) for entry in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"data.train[{weighted.index(False)}] has no weight, but other sources have; give "
                f"all of them one, or none"
            )
        for number, entry in enumerate(self.eval):
            if isinstance(entry, SourceSection) and entry.weight is not None:
                raise ValueError(
                    f"data.eval[{number}].weight means nothing: every evaluation row is scored once"
                )
        if self.eval and self.eval_fraction:
            raise ValueError(
                "data.eval and data.eval_fraction both say what to evaluate on; keep one"
            )

    @property
    def is_evaluated(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval or self.eval_fraction)


def _check_date(text: str) -> None:
    try:
        known = date.fromisoformat(text).isoformat() == text
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"data.template_date is {text!r}; it must be a day written as 2026-11-30, or null"
        )
