"""Loss and perplexity of text rows; answer loss and exact match of chat rows.

Losses weigh every token the same. Of text rows every token counts, of chat rows the assistant's
turns. Exact match asks for the last assistant turn of a chat row, greedily, and compares the whole
text, white space at the ends aside; an answer may have 16 tokens more than the expected one."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.commands.sampling import DTYPES, add_cache_argument, to_compute

if TYPE_CHECKING:
    from llama_jax.config import Compute
    from llama_jax.load import Model
    from train.data.rows import Row

HELP = "loss, perplexity and exact match of a file of rows"
EXAMPLE = "llama-jax eval smollm2-135m --data llama_jax/demo/heldout.jsonl --json"

DEFAULT_SEQUENCE_LENGTH = 2048
SPARE_TOKENS = 16

# told(rows done, rows in all, what is being done)
Progress = Callable[[int, int, str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from llama_jax.commands.adapted import add_adapter_arguments

    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="F.jsonl", help="files of text or chat rows"
    )
    add_adapter_arguments(parser)
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="text rows are split into pieces of N tokens, longer chat rows are refused "
        f"(default: {DEFAULT_SEQUENCE_LENGTH}, or the model's context where that is shorter)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="rows at once (default: 32)"
    )
    parser.add_argument(
        "--no-exact-match", action="store_true", help="do not generate, only score the rows"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the computation (default: %(default)s)",
    )
    add_cache_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.report import Progress as Lines
    from llama_jax.commands.startup import start_jax
    from train.data.sources import read_rows

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.no_exact_match and args.cache_dtype is not None:
        raise ValueError(
            "--cache-dtype is about generating, which --no-exact-match leaves out; keep one"
        )
    rows = list(read_rows(args.data))
    if args.cache_dtype is not None and all(row.kind != "chat" for row in rows):
        raise ValueError(
            "--cache-dtype is about generating, but only chat rows are answered and there are "
            "none; leave it out"
        )
    start_jax()
    from llama_jax.commands.adapted import load_adapted

    return evaluate(
        load_adapted(args),
        rows,
        compute=to_compute(args),
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        match=not args.no_exact_match,
        progress=Lines().update,
    )


def evaluate(
    model: "Model",
    rows: Sequence["Row"],
    *,
    compute: "Compute",
    sequence_length: int | None = None,
    batch_size: int = 32,
    match: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of the command for rows that are read already."""
    from infer.evaluate import score
    from train.data.render import render_rows
    from train.data.report import DataReport
    from train.sections.data import DataSection

    for row in rows:
        if row.kind == "preference":
            raise ValueError(
                f"{row.where}: a preference row has two answers; eval scores text, chat and "
                f"instruction rows"
            )
        if match and row.kind == "chat" and not _last_answer(row):
            raise ValueError(
                f"{row.where}: the one assistant turn comes first, so there is nothing it answers; "
                f"put a user's turn before it, or give --no-exact-match"
            )
    if model.tokenizer is None:
        raise ValueError("the model brings no tokenizer, so rows cannot be turned into tokens")
    context = model.config.max_position_embeddings
    length = min(DEFAULT_SEQUENCE_LENGTH, context) if sequence_length is None else sequence_length
    if not 2 <= length <= context:
        raise ValueError(f"--sequence-length is {length}; the model takes 2 to {context} tokens")
    section = DataSection(train=("rows",), long_rows="refuse", long_texts="split")
    samples = render_rows(
        rows,
        model.tokenizer,
        section,
        sequence_length=length,
        train_all=False,
        report=DataReport(),
        limit="--sequence-length",
        advice=f"give more, up to the model's {context}, or shorten the row or leave it out",
    )
    sequences = [(sample.ids.tolist(), sample.mask.tolist()) for sample in samples]
    told = progress or (lambda done, total, note: None)
    result = score(
        model.config,
        model.params,
        sequences,
        compute=compute,
        batch_tokens=batch_size * 64,
        progress=lambda done, total: told(done, total, "rows scored"),
    )
    report: dict[str, Any] = {
        "rows": len(rows),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
    }
    chats = [row for row in rows if row.kind == "chat"]
    if match and chats:
        answers, expected = answer(
            model, chats, compute=compute, batch_size=batch_size, progress=told
        )
        from infer.evaluate import exact_match

        report["exact_match"] = exact_match(answers, expected)
    return report


def _last_answer(row: "Row") -> int:
    """The number of a chat row's last assistant turn."""
    messages = row.values["messages"]
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def answer(
    model: "Model",
    rows: Sequence["Row"],
    *,
    compute: "Compute",
    batch_size: int,
    progress: Progress,
) -> tuple[list[str], list[str]]:
    """The model's greedy last turns of chat rows, and the expected ones."""
    from infer.generate import generate
    from infer.params import SamplingParams

    assert model.tokenizer is not None
    prompts, params, expected = [], [], []
    for row in rows:
        messages, last = row.values["messages"], _last_answer(row)
        wanted = messages[last]["content"]
        prompts.append(messages[:last])
        expected.append(wanted)
        limit = len(model.tokenizer.encode_plain(wanted)) + SPARE_TOKENS
        params.append(SamplingParams(temperature=0.0, max_tokens=limit))
    done = 0

    def count(piece: Any) -> None:
        nonlocal done
        if piece.finish_reason is not None:
            done += 1
            progress(done, len(rows), "answers generated")

    outputs = generate(
        model,
        prompts,
        params,
        chat=True,
        stream=count,
        compute=compute,
        batch_size=batch_size,
    )
    return [output.text or "" for output in outputs], expected


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import print_table

    names = ", ".join(Path(name).name for name in args.data)
    rows: list[tuple[str, str]] = [
        ("rows", str(report["rows"])),
        ("tokens that count", str(report["tokens"])),
        ("loss", f"{report['loss']:.4f}"),
        ("perplexity", f"{report['perplexity']:.3f}"),
    ]
    if "exact_match" in report:
        rows.append(("exact match", f"{report['exact_match']:.1%}"))
    print_table(f"{args.model} on {names}", ("", "value"), rows)
