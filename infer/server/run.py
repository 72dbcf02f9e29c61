"""A server process: listens at once, loads models behind it, ends when it is told to.

On SIGTERM or SIGINT new requests are refused, running ones get `drain_seconds`, what is left then
is ended with an error, and the process exits with 0. A second signal ends it at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from infer.registry import Registry
from infer.server.app import make_app
from infer.server.auth import Gate
from infer.server.errors import ApiError
from infer.server.generation import Context
from infer.server.loaded import Build, Source
from infer.server.mailbox import Waker
from infer.server.metrics import Metrics
from infer.server.models import Models
from infer.server.pool import Pool
from infer.server.protocol import limited_protocol
from infer.server.rpc import start_grpc
from infer.server.settings import Settings
from infer.server.tracing import tracing_to

logger = logging.getLogger(__name__)

# After the engines have stopped, for the last events to reach the clients.
FLUSH_SECONDS = 5
# The same where other hosts are lost.
FAREWELL_SECONDS = 1.0


@dataclass(frozen=True)
class Address:
    """Where the server listens. grpc_port: None without gRPC."""

    host: str
    port: int
    grpc_port: int | None


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would close the door before the last answers are out."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_context(settings: Settings, build: Build, sources: list[Source]) -> Context:
    """All parts of a server, on the running event loop."""
    registry = None if settings.models_dir is None else Registry(settings.models_dir)
    models = Models(settings, build, sources, registry)
    metrics = Metrics(models.reports.statistics)
    models.watcher.on_restart = lambda loaded: metrics.engine_restarts.labels(
        loaded.name, loaded.version
    ).inc()
    waker = Waker(asyncio.get_running_loop())
    endpoint = settings.otlp_endpoint
    tracing = None if endpoint is None else tracing_to(endpoint)
    embeddings = Pool("embedding requests", threads=2, limit=settings.queue_limit)
    return Context(settings, models, Gate(settings), metrics, waker, embeddings, tracing)


def run(
    settings: Settings,
    build: Build,
    sources: list[Source],
    *,
    at_end: Callable[[], None] = lambda: None,
    **options: Any,
) -> int:
    """`serve` in this process, of which it is the whole purpose; the exit code. at_end: called when
    all is done."""

    async def main() -> int:
        code = await serve(settings, build, sources, **options)
        at_end()
        # What loads in a thread cannot be stopped, and would keep the process until it is done.
        if threading.active_count() > 1:
            logging.shutdown()
            os._exit(code)
        return code

    return asyncio.run(main())


async def serve(
    settings: Settings,
    build: Build,
    sources: list[Source],
    *,
    on_listening: Callable[[Address], None] = lambda address: None,
    stop: asyncio.Event | None = None,
) -> int:
    """Runs until a signal comes, or a model cannot be loaded at the start; the exit code.

    stop: ends the server when it is set, in place of signals.
    """
    stop = _stop_signals() if stop is None else stop
    context = make_context(settings, build, sources)
    sock = _listen(settings)
    server = _Server(_config(settings, context))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    grpc_server = None
    if settings.grpc_port is not None:
        grpc_server = await start_grpc(context, settings.host, settings.grpc_port)
    address = Address(
        settings.host, sock.getsockname()[1], None if grpc_server is None else grpc_server.port
    )
    logger.info("listening", extra={"address": address})
    on_listening(address)
    code = await _load_and_wait(context.models, stop)
    logger.info("draining", extra={"seconds": settings.drain_seconds})
    await context.models.stop(settings.drain_seconds)
    if grpc_server is not None:
        await grpc_server.stop(FLUSH_SECONDS)
    server.should_exit = True
    await serving
    if context.tracing is not None:
        await asyncio.to_thread(context.tracing.close)
    logger.info("stopped", extra={"exit_code": code})
    return code


async def _load_and_wait(models: Models, stop: asyncio.Event) -> int:
    """Returns when it is time to end."""
    loading = asyncio.create_task(models.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    error = loading.exception()
    if error is None:
        logger.info("ready")
        await stopping
        return 0
    stopping.cancel()
    if not isinstance(error, ApiError):
        raise error
    logger.error("not started", extra={"reason": error.message})
    # As with every command: 2 is for what the caller gave, 1 for what went wrong.
    return 2 if isinstance(error.__cause__, ValueError) else 1


def give_up(message: str) -> None:
    """Ends this process of several that run a model together: its devices wait for what never
    comes, so nothing can be waited for. Clients that were told the reason get it first."""
    logger.critical("given up", extra={"reason": message})
    time.sleep(FAREWELL_SECONDS)
    logging.shutdown()
    os._exit(1)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        # From here on clients wait instead of being refused.
        sock.listen(2048)
    except OSError as error:
        sock.close()
        where = f"{settings.host}:{settings.port}"
        raise OSError(f"cannot listen on {where}: {error.strerror}") from error
    sock.set_inheritable(True)
    return sock


def _config(settings: Settings, context: Context) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(context),
        http=limited_protocol(
            head_timeout_seconds=settings.head_timeout_seconds,
            write_timeout_seconds=settings.write_timeout_seconds,
            max_connections=settings.max_connections,
        ),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=round(settings.keep_alive_seconds),
        timeout_graceful_shutdown=FLUSH_SECONDS,
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )


def _stop_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop
