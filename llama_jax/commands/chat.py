"""A conversation in the terminal; the answer appears while it is generated.

/reset forgets the conversation, /quit or the end of input ends it, Ctrl-C stops an answer."""

import argparse
import sys
from typing import TYPE_CHECKING

from llama_jax.commands.sampling import add_sampling_arguments, to_compute, to_sampling_params

if TYPE_CHECKING:
    from infer.generate import Generator
    from infer.params import SamplingParams

HELP = "talk with a model in the terminal"
EXAMPLE = "llama-jax chat smollm2-135m"

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT adapter folder to put on the model"
    )
    add_sampling_arguments(parser, temperature=0.7, top_p=0.95)


def run(args: argparse.Namespace) -> int:
    from llama_jax.commands.startup import start_jax

    params, compute = to_sampling_params(args), to_compute(args)
    start_jax()
    from infer.generate import Generator
    from llama_jax.load import load

    model = load(args.model, adapter=args.adapter)
    generator = Generator(model.config, model.params, model.tokenizer, compute=compute)
    return converse(generator, params, system=args.system)


def converse(generator: "Generator", params: "SamplingParams", *, system: str | None) -> int:
    """Reads lines from standard input until it ends; returns the exit code."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while True:
        asked = _ask()
        if asked is None or asked == "/quit":
            return 0
        if asked == "/reset":
            messages = list(start)
            continue
        if not asked:
            continue
        turn = [*messages, {"role": "user", "content": asked}]
        try:
            answer = _answer(generator, params, turn)
        except ValueError as error:
            # For instance a conversation that has outgrown the context: the talk goes on.
            sys.stderr.write(f"error: {error}\n")
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """The next line, None at the end of input. The prompt is shown to people only."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            print()  # noqa: T201
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(generator: "Generator", params: "SamplingParams", messages: list[Message]) -> str:
    """Prints the answer while it grows. Ctrl-C keeps what is there."""
    text = ""
    try:
        for piece in generator.stream([messages], params, chat=True):
            text += piece.text
            print(piece.text, end="", flush=True)  # noqa: T201
    except KeyboardInterrupt:
        pass
    print(flush=True)  # noqa: T201
    return text
