"""Answers a file of requests in OpenAI's batch form, many at once.

A line of IN is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}; the
urls /v1/completions and /v1/embeddings are allowed too, and the body's model is the last part of
MODEL's name. Answers are appended to OUT as they come, in any order. When a run was ended, the same
command goes on: nothing is lost and nothing done twice."""

import argparse
import asyncio
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.server.batch import Counts

HELP = "answer a file of requests, with resume"
EXAMPLE = "llama-jax batch smollm2-135m requests.jsonl answers.jsonl"

_FIELDS = (
    "adapters",
    "max_adapters",
    "max_lora_rank",
    "max_slots",
    "max_context",
    "cache_tokens",
    "draft_tokens",
    "draft_model",
    "dtype",
    "cache_dtype",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from infer.server.settings import flag_fields

    parser.add_argument("model", metavar="MODEL", help="MODEL or NAME=MODEL")
    parser.add_argument("source", metavar="IN.jsonl", help="the requests")
    parser.add_argument("target", metavar="OUT.jsonl", help="the answers; appended to")
    for each in flag_fields():
        if each.name in _FIELDS:
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, metavar="VALUE", help=each.metadata["help"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from infer.server.settings import Settings
    from infer.server.settings_reader import from_text

    given = {}
    for name in _FIELDS:
        value = getattr(args, name)
        if value is not None:
            given[name] = from_text("--" + name.replace("_", "-"), value, name)
    # A batch waits for as long as it takes.
    settings = Settings(models=(args.model,), request_timeout_seconds=1e9, max_choices=128, **given)
    source, target = Path(args.source), Path(args.target)
    if target.exists() and source.exists() and source.samefile(target):
        raise ValueError(f"IN and OUT are the same file {source}")
    try:
        from infer.server.batch import read_batch, run_batch
        from infer.server.build import given_sources, make_build
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"batch needs the serve extra ({error.name} is missing); run: "
            f"pip install 'llama-jax[serve]'"
        ) from error
    from llama_jax.commands.startup import start_jax

    read_batch(source)  # what is wrong with it is said before the model is loaded
    (model,) = given_sources(settings)
    build = make_build(settings)
    start_jax()
    began = time.perf_counter()
    counts = asyncio.run(
        run_batch(source, target, settings=settings, build=build, model=model, on_done=_report)
    )
    return {**asdict(counts), "seconds": time.perf_counter() - began}


def _report(counts: "Counts") -> None:
    sys.stderr.write(f"{counts.before + counts.done} of {counts.total}\n")


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"{report['done']} answered in {report['seconds']:.1f} s, {report['before']} were answered "
        f"before, {report['failed']} with an error"
    )
