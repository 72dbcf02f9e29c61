"""Serves models over REST in OpenAI's shapes, and over gRPC.

A MODEL is served under the last part of its name, or as NAME with NAME=MODEL. With --models-dir the
versions of a registry are served too (llama-jax register fills it). Every flag can also be set as
an environment variable (--max-slots is LLAMA_JAX_MAX_SLOTS) or in the YAML file of --config; flags
win over variables, variables over the file. Keys are better given as LLAMA_JAX_API_KEY and
LLAMA_JAX_ADMIN_KEY."""

import argparse
import os
import sys
from typing import Any

from llama_jax.commands.run_config import find_serve_config

HELP = "serve models over REST and gRPC"
EXAMPLE = "llama-jax serve smollm2-135m --port 8000"

_SECRET_FLAGS = ("--api-key", "--admin-key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from infer.server.settings import flag_fields

    parser.add_argument("model", metavar="MODEL", nargs="*", help="MODEL or NAME=MODEL")
    parser.add_argument("--config", metavar="F.yaml", help="settings; a file or a shipped one")
    for each in flag_fields():
        flag = "--" + each.name.replace("_", "-")
        text = each.metadata["help"]
        if each.default not in (None, (), False):
            text += f" (default: {each.default})"
        if each.type in (bool, "bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "LIST" if each.default == () else "VALUE"
            parser.add_argument(flag, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> int:
    from infer.server.settings import flag_fields, from_text, read_settings

    _hide_keys()
    flags: dict[str, Any] = {"models": tuple(args.model) or None}
    for each in flag_fields():
        value = getattr(args, each.name)
        if isinstance(value, str):
            value = from_text("--" + each.name.replace("_", "-"), value, each.name)
        flags[each.name] = value
    config = None if args.config is None else find_serve_config(args.config)
    settings = read_settings(flags, config=config)
    # Nothing that a library starts or writes finds them there.
    for name in ("LLAMA_JAX_API_KEY", "LLAMA_JAX_ADMIN_KEY"):
        os.environ.pop(name, None)
    from infer.server.logs import set_up_logging

    set_up_logging(settings.log_level, settings.secrets, show_messages=settings.log_error_messages)
    return _serve(settings)


def _serve(settings: Any) -> int:
    try:
        from infer.server.build import given_sources, make_build
        from infer.server.run import Address
        from infer.server.run import run as run_server
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"serving needs the serve extra ({error.name} is missing); run: "
            f"pip install 'llama-jax[serve]'"
        ) from error
    from llama_jax.commands.startup import start_jax

    sources = given_sources(settings)
    build = make_build(settings, start_jax)

    def on_listening(address: Address) -> None:
        host = f"[{address.host}]" if ":" in address.host else address.host
        print(f"REST on http://{host}:{address.port}", flush=True)
        if address.grpc_port is not None:
            print(f"gRPC on {host}:{address.grpc_port}", flush=True)
        if not settings.all_tenants and settings.host not in ("127.0.0.1", "localhost", "::1"):
            sys.stderr.write("warning: no API key is set, so anyone who reaches it may ask\n")

    return run_server(settings, build, sources, on_listening=on_listening)


def _hide_keys() -> None:
    """Starts the process anew where a key is among its arguments, which others can list.

    The new one gets it in the environment, which they cannot.
    """
    environment = dict(os.environ)
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if flag not in _SECRET_FLAGS:
            kept.append(argument)
            continue
        name = "LLAMA_JAX_" + flag.removeprefix("--").replace("-", "_").upper()
        environment[name] = value if separator else next(arguments, "")
    if len(kept) < len(sys.argv) - 1:
        program = [sys.executable, "-m", "llama_jax.cli", *kept]
        os.execve(sys.executable, program, environment)  # noqa: S606  no shell is wanted
