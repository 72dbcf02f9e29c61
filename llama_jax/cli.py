"""The command `llama-jax`: parses, then calls.

Exit codes: 0 done, 1 failed at run time, 2 wrong input or configuration, 75 training was stopped by
SIGTERM and goes on when started again. With `--json` standard output holds exactly one JSON value,
everything else goes to standard error.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from llama_jax import __version__
from llama_jax.commands.errors import FAILED, USUAL_ERRORS, WRONG_INPUT, code_of, complain
from llama_jax.commands.report import to_json

COMMANDS = (
    "demo",
    "models",
    "train",
    "fit",
    "generate",
    "chat",
    "eval",
    "export",
    "convert",
    "quantize",
    "prune",
    "merge",
    "register",
    "serve",
    "batch",
    "launch",
    "doctor",
)

DONE, INTERRUPTED = 0, 130


def command_module(name: str) -> ModuleType:
    return import_module(f"llama_jax.commands.{name}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-jax",
        description="Training and inference for the Llama family in JAX and Flax.",
        epilog="MODEL is a Hugging Face folder, a .gguf file, a llama-jax checkpoint folder, "
        "smollm2-135m (the model of the demo extra), or the id of a model on the Hub.",
    )
    parser.add_argument("--version", action="version", version=f"llama-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = command_module(name)
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=f"{module.__doc__}".strip(),
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "--traceback", action="store_true", help="show where an error came from"
        )
        if hasattr(module, "show"):
            command.add_argument(
                "--json", action="store_true", help="print one JSON value on standard output"
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parse(argv)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s", force=True
    )
    for ours in ("llama_jax", "train", "infer"):
        logging.getLogger(ours).setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A path may hold bytes that are no text; they go out as they came in.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        return _run(args)
    except KeyboardInterrupt:
        complain(args.command, KeyboardInterrupt("interrupted"))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except USUAL_ERRORS as error:
        code = code_of(error)
        if args.traceback and code in (WRONG_INPUT, FAILED):
            raise
        complain(args.command, error)
        return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value may also stand behind flags, where argparse gives a positional nothing more."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides"):
        args.overrides += [text for text in rest if _is_override(text)]
        rest = [text for text in rest if not _is_override(text)]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _run(args: argparse.Namespace) -> int:
    module = command_module(args.command)
    if not hasattr(module, "show"):
        return module.run(args) or DONE
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):
            report = module.run(args)
        print(to_json(report), flush=True)
    else:
        report = module.run(args)
        module.show(report, args)
    return FAILED if isinstance(report, dict) and report.get("ok") is False else DONE


def program() -> None:
    """What a shell starts: `main`, and the end of the process."""
    code = main()
    if code == INTERRUPTED:
        # JAX may still be compiling in a thread, which crashes when Python takes JAX apart.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
