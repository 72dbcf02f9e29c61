"""Completes prompts, several at once.

Prompts are given one by one, or in a JSON lines file whose rows are {"prompt": "…"} or
{"messages": [{"role": …, "content": …}, …]}. With --chat a prompt is a user's message."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.commands.sampling import add_sampling_arguments, to_compute, to_sampling_params

if TYPE_CHECKING:
    from infer.completion import Output, Piece, TokenLogprob

HELP = "complete prompts, batched"
EXAMPLE = 'llama-jax generate smollm2-135m --prompt "The capital of France is" --max-tokens 16'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from llama_jax.commands.adapted import add_adapter_arguments

    parser.add_argument("model", metavar="MODEL")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one prompt or several"
    )
    source.add_argument("--prompts", metavar="F.jsonl", help="a file of prompts")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are messages of a user to the chat model"
    )
    add_adapter_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="prompts at once (default: 32)"
    )
    add_sampling_arguments(parser, temperature=0.0, top_p=1.0)
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        nargs="?",
        const=0,
        metavar="K",
        help="report log probabilities, and K alternatives of each token",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.startup import start_jax

    # Everything that can be wrong with the request is checked before JAX starts.
    params = to_sampling_params(args, top_p=1.0, n=args.n, logprobs=args.logprobs)
    compute = to_compute(args)
    prompts, chat = _prompts(args)
    start_jax()
    from infer.generate import generate
    from infer.offline import complete
    from llama_jax.commands.adapted import load_adapted

    model = load_adapted(args)
    shared: dict[str, Any] = {"chat": chat, "compute": compute, "batch_size": args.batch_size}
    if args.prompts is not None:
        outputs = complete(model, prompts, params, **shared)
    else:
        # One batch at once needs no engine, which takes seconds to start.
        stream = _print_piece if _streams(args, len(prompts) * args.n) else None
        outputs = generate(model, prompts, params, stream=stream, **shared)
    return {
        "outputs": [to_json_output(output) for output in outputs],
        "tokens_per_second": outputs.tokens_per_second,
    }


def _streams(args: argparse.Namespace, num_texts: int) -> bool:
    """A single text for a person is shown while it grows."""
    return not args.json and num_texts == 1 and args.prompts is None


def _print_piece(piece: "Piece") -> None:
    print(piece.text, end="", flush=True)


def _prompts(args: argparse.Namespace) -> tuple[list[Any], bool]:
    """The prompts, and whether they are conversations."""
    if args.prompts is None:
        return args.prompt, args.chat
    if not args.prompts.strip():
        # An empty path would be the current folder.
        raise ValueError("the name of the file of prompts is empty; give a JSON lines file")
    prompts = read_prompts(Path(args.prompts))
    has_messages = [not isinstance(prompt, str) for prompt in prompts]
    if any(has_messages) and not all(has_messages):
        raise ValueError(
            f"{args.prompts}: rows with prompt and rows with messages are mixed; use two files"
        )
    return prompts, args.chat or has_messages[0]


def read_prompts(path: Path) -> list[Any]:
    """A text or a list of messages for each row. Raises ValueError naming file and line."""
    from llama_jax.formats.json_fields import parse_json, read_text, shorten

    prompts = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, unique=True)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or len(row) != 1 or set(row) - {"prompt", "messages"}:
            raise ValueError(
                f'{where}: a row is {{"prompt": "…"}} or {{"messages": […]}}, not {line[:80]}'
            )
        value = next(iter(row.values()))
        kind, allowed = (str, "a text") if "prompt" in row else (list, "a list of messages")
        if not isinstance(value, kind) or not value:
            raise ValueError(
                f"{where}: {next(iter(row))} is {shorten(value)}; it must be {allowed} that is not "
                f"empty"
            )
        prompts.append(value)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def to_json_output(output: "Output") -> dict[str, Any]:
    row = {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "index": output.index,
    }
    if output.logprobs is not None:
        row["logprobs"] = [_logprob(each) for each in output.logprobs]
    return row


def _logprob(token: "TokenLogprob") -> dict[str, Any]:
    values = asdict(token)
    for entry in (values, *values["top"]):
        entry["bytes"] = list(entry["bytes"])
    return values


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    outputs = report["outputs"]
    if _streams(args, len(outputs)):
        print()
    else:
        for output in outputs:
            prompt = output["prompt"]
            asked = prompt if isinstance(prompt, str) else prompt[-1].get("content", prompt[-1])
            print(f"--- {asked}\n{output['text']}")
            if args.logprobs is not None:
                print(json.dumps(output["logprobs"], ensure_ascii=False))
    sys.stderr.write(f"{report['tokens_per_second']:.1f} tokens/s\n")
