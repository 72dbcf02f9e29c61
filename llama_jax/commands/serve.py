"""Serves models over REST in OpenAI's shapes, and over gRPC.

A MODEL is served under the last part of its name, or as NAME with NAME=MODEL. With --models-dir the
versions of a registry are served too (llama-jax register fills it). Every flag can also be set as
an environment variable (--max-slots is LLAMA_JAX_MAX_SLOTS) or in the YAML file of --config; flags
win over variables, variables over the file. Keys are better given as LLAMA_JAX_API_KEY and
LLAMA_JAX_ADMIN_KEY.

Models that need several hosts are served by the same command on each of them: process 0 listens,
and the others take part in its steps."""

import argparse
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from llama_jax.commands import processes
from llama_jax.commands.errors import USUAL_ERRORS, code_of, complain
from llama_jax.commands.run_config import find_serve_config

if TYPE_CHECKING:
    from infer.server.group import Group
    from infer.server.settings import Settings
    from llama_jax.mesh.processes import Processes

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
        elif each.default == ():
            text += "; several with commas, or the flag several times"
            parser.add_argument(flag, metavar="LIST", action="append", help=text)
        else:
            parser.add_argument(flag, metavar="VALUE", help=text)
    processes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from infer.server.settings import flag_fields
    from infer.server.settings_reader import from_text, read_settings

    _hide_keys()
    flags: dict[str, Any] = {"models": tuple(args.model) or None}
    for each in flag_fields():
        value = getattr(args, each.name)
        if isinstance(value, list):
            value = ",".join(value)
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
    return _serve(settings, processes.read(args))


def _serve(settings: "Settings", several: "Processes | None") -> int:
    try:
        from infer.server.build import given_sources, make_build
        from infer.server.run import Address, give_up
        from infer.server.run import run as run_server
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"serving needs the serve extra ({error.name} is missing); run: "
            f"pip install 'llama-jax[serve]'"
        ) from error
    from llama_jax.commands.startup import start_jax

    sources = given_sources(settings)

    group: Group | None = None

    def at_end() -> None:
        if group is not None:
            group.close()
        elif several is not None:
            leave()

    if several is not None:
        # Which process this is, JAX may have to find out; with one alone it starts when it loads.
        start_jax(processes=several)
        from llama_jax.mesh.distributed import is_alone, is_main, leave

        if not is_main():
            return _follow(settings, sources)
        if not is_alone():
            from infer.server import group as several_hosts

            group = several_hosts.Group(settings, give_up)
    build = make_build(settings, start_jax) if group is None else group.build

    def on_listening(address: Address) -> None:
        host = f"[{address.host}]" if ":" in address.host else address.host
        print(f"REST on http://{host}:{address.port}", flush=True)
        if address.grpc_port is not None:
            print(f"gRPC on {host}:{address.grpc_port}", flush=True)
        if not settings.all_tenants and settings.host not in ("127.0.0.1", "localhost", "::1"):
            sys.stderr.write("warning: no API key is set, so anyone who reaches it may ask\n")

    return run_server(settings, build, sources, on_listening=on_listening, at_end=at_end)


def _follow(settings: "Settings", sources: list[Any]) -> int:
    """Ends with the process that listens, which drains its requests after SIGTERM: so a signal that
    comes to all is left to that one. A second one ends this."""
    import signal

    from infer.engine.hosts import HostLostError
    from infer.server.group import follow
    from infer.server.run import give_up
    from llama_jax.mesh.distributed import leave

    def on_signal(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    sys.stderr.write("taking part in the steps of process 0, which listens\n")
    try:
        follow(settings, sources)
    except HostLostError as error:
        give_up(str(error))
    except USUAL_ERRORS as error:
        complain("serve", error)
        leave()
        # At an ordinary end JAX might wait for what its devices never get.
        sys.stderr.flush()
        os._exit(code_of(error))
    # What loads in a thread cannot be stopped, and would keep the process until it is done.
    if threading.active_count() > 1:
        logging.shutdown()
        os._exit(0)
    return 0


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
