"""A conversation in the terminal; the answer appears while it is generated.

/help lists what can be typed beside messages; the end of input ends it, Ctrl-C stops an answer."""

import argparse
import sys

from llama_jax.commands.sampling import add_sampling_arguments, to_compute, to_sampling_params

HELP = "talk with a model in the terminal"
EXAMPLE = "llama-jax chat smollm2-135m"

_TOP_P = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from llama_jax.commands.adapted import add_adapter_arguments

    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_adapter_arguments(parser)
    add_sampling_arguments(parser, temperature=0.7, top_p=_TOP_P)


def run(args: argparse.Namespace) -> int:
    from llama_jax.commands.startup import start_jax

    params, compute = to_sampling_params(args, top_p=_TOP_P), to_compute(args)
    start_jax()
    from infer.chat import chat
    from llama_jax.commands.adapted import load_adapted

    model = load_adapted(args)
    chat(model, params, system=args.system, compute=compute, read=_read)
    return 0


def _read(prompt: str) -> str:
    """A line of standard input; the prompt is for people, not for pipes."""
    return input(prompt if sys.stdin.isatty() else "")
