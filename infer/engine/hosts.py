"""Several hosts that run the same engines: the first decides, the others begin the same steps.

The devices of a slice belong to several processes, each of which must begin every step, in the same
order and with the same arguments. So process 0 (the leader: it has the schedulers, and the server)
tells the others over TCP what it is about to run; what they compute stays on the devices. An order
is the number of an engine, the name of a method of its runner and the arguments, as MessagePack:
nothing in it is code.

There is one stream of orders for all engines. Process 0 begins what an order says before anyone
tells the next (`Followers.told`), and the others do one after the other, so the steps of two
engines, too, begin in the same order everywhere.
"""

import contextlib
import dataclasses
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
import numpy as np

from infer.engine.agreement import Agreement
from infer.engine.plan import Plan
from infer.sampling import Needs, Rows
from llama_jax.mesh.distributed import ProcessError, coordinator_host, exchange, leave

CONNECT_SECONDS = 60.0
_KEEP_ALIVE_SECONDS = 60

# A step that needs a process which is gone may fail before the connection to that one does: how
# long a failure waits for such a sign of its cause.
LOST_SECONDS = 2.0

# Dataclasses that arguments may be made of.
_CLASSES: dict[str, type] = {each.__name__: each for each in (Plan, Rows, Needs)}
_ARRAY, _OBJECT = 1, 2
_LENGTH = struct.Struct(">Q")
_SECRET_BYTES = 32

# Told at an orderly end of an engine, and of all.
LEAVE = "leave"
_GOODBYE = "goodbye"
_NO_ENGINE = -1

# How long the end waits for an order that is being done, such as a load.
_LAST_ORDER_SECONDS = 5.0

# Of an engine, of a method, and its arguments.
Order = tuple[int, str, list[Any]]


class HostLostError(RuntimeError):
    """A process that takes part in every step is gone, so no step can end any more."""


class Followers:
    """The leader's side: connections to all other processes, which wait for orders."""

    def __init__(self, name: str, give_up: Callable[[str], None]):
        """Meets the others, who call `Leader(name)`. Raises ProcessError where they do not come.

        give_up: called, in any thread, with the reason when steps can no more be run together:
        what the devices wait for then never comes, so this process must end.
        """
        secret = secrets.token_bytes(_SECRET_BYTES)
        self.give_up = give_up
        self._sockets: list[socket.socket] = []
        self._is_over = False
        self._reason: str | None = None
        self._is_lost = threading.Event()
        self._telling = threading.Lock()
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            others = len(exchange(f"{name}/address", f"{port} {secret.hex()}")) - 1
            server.settimeout(CONNECT_SECONDS)
            while len(self._sockets) < others:
                try:
                    connection, _ = server.accept()
                except TimeoutError as error:
                    missing = others - len(self._sockets)
                    raise ProcessError(
                        f"{missing} of {others} other processes did not connect to port {port} "
                        f"within {CONNECT_SECONDS:g} seconds; hosts must reach each other"
                    ) from error
                if _knows(connection, secret):
                    self._sockets.append(connection)
                else:
                    connection.close()
        for number, connection in enumerate(self._sockets):
            threading.Thread(
                target=self._watch, args=(number, connection), name="follower", daemon=True
            ).start()

    @contextlib.contextmanager
    def told(self, engine: int, order: str, arguments: Sequence[Any]) -> Iterator[None]:
        """What the others are told is begun inside; no other order is told before the end. Takes no
        other lock, so whoever holds one may wait here. Raises HostLostError."""
        with self._telling:
            self._tell(engine, order, arguments)
            yield

    def _tell(self, engine: int, order: str, arguments: Sequence[Any]) -> None:
        message = encode(engine, order, arguments)
        for number, connection in enumerate(self._sockets):
            try:
                connection.sendall(message)
            except OSError as error:
                raise HostLostError(self._lost(number)) from error

    def lost(self, seconds: float) -> str | None:
        """Who is gone, where that shows within so many seconds."""
        self._is_lost.wait(seconds)
        return self._reason

    def close(self) -> None:
        """Lets the others end, and waits for that."""
        if not self._is_over:
            self._is_over = True
            if self._telling.acquire(timeout=_LAST_ORDER_SECONDS):
                with contextlib.suppress(HostLostError):  # who is gone need not be told
                    self._tell(_NO_ENGINE, _GOODBYE, ())
            leave()
        for connection in self._sockets:
            connection.close()

    def _watch(self, number: int, connection: socket.socket) -> None:
        """Others never speak: what can be read is that one is gone."""
        with contextlib.suppress(OSError):  # that is gone, too
            connection.recv(1)
        if not self._is_over:
            self._is_over = True
            self._reason = self._lost(number)
            self._is_lost.set()
            self.give_up(self._reason)

    def _lost(self, number: int) -> str:
        return f"one of the {len(self._sockets)} other processes of this server is gone ({number})"


class EngineFollowers:
    """The same for one engine of the leader, whose number all that it tells carries."""

    def __init__(self, followers: Followers, engine: int):
        self._followers, self._engine = followers, engine
        self.agreement = Agreement(f"engine {engine}")

    def told(self, order: str, *arguments: Any) -> contextlib.AbstractContextManager[None]:
        return self._followers.told(self._engine, order, arguments)

    def lost(self, seconds: float) -> str | None:
        return self._followers.lost(seconds)

    def give_up(self, reason: str) -> None:
        """All engines end: no two can be told apart on the devices."""
        self._followers.give_up(reason)

    def close(self) -> None:
        """The others let the engine go."""
        with contextlib.suppress(HostLostError), self.told(LEAVE):  # who is gone has none
            pass


class Leader:
    """The side of every other process."""

    def __init__(self, name: str):
        """Meets the leader. Raises ProcessError."""
        port, secret = exchange(f"{name}/address")[0].split()
        address = coordinator_host(), int(port)
        try:
            self._socket = socket.create_connection(address, timeout=CONNECT_SECONDS)
        except OSError as error:
            raise ProcessError(
                f"process 0 cannot be reached at {address[0]}:{port}: {error}"
            ) from error
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        self._socket.sendall(bytes.fromhex(secret))

    def is_gone(self, seconds: float) -> bool:
        """Whether it goes within so many seconds, for a step that failed: that may be the cause.
        What it still orders is passed over."""
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(2**16):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def orders(self) -> Iterator[Order]:
        """Until the leader says goodbye. Raises HostLostError when it ends without."""
        with self._socket, self._socket.makefile("rb") as stream:
            while True:
                try:
                    order = read_order(stream)
                except (OSError, EOFError) as error:
                    raise HostLostError(f"process 0 of this server is gone: {error}") from error
                if order[1] == _GOODBYE:
                    break
                yield order
        leave()


def _knows(connection: socket.socket, secret: bytes) -> bool:
    """Whether who connects belongs to this program."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(CONNECT_SECONDS)
    received = b""
    try:
        while len(received) < len(secret):
            part = connection.recv(len(secret) - len(received))
            if not part:
                return False
            received += part
    except OSError:
        return False
    connection.settimeout(None)
    _keep_alive(connection)
    return hmac.compare_digest(received, secret)


def _keep_alive(connection: socket.socket) -> None:
    """Networks forget connections that are silent for minutes, as those of an idle server are."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_SECONDS)


def encode(engine: int, order: str, arguments: Sequence[Any]) -> bytes:
    """An order as bytes: its length and then MessagePack."""
    plain = [engine, order, list(arguments)]
    body: bytes = msgpack.packb(plain, default=_to_plain, strict_types=True)
    return _LENGTH.pack(len(body)) + body


def read_order(stream: Any) -> Order:
    """The next order of a binary stream. Raises EOFError at its end."""
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    engine, order, arguments = _decode(_read(stream, length))
    return engine, order, arguments


def _read(stream: Any, length: int) -> bytes:
    content: bytes = stream.read(length)
    if len(content) < length:
        raise EOFError("the connection was closed")
    return content


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        parts = [value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()]
        return msgpack.ExtType(_ARRAY, msgpack.packb(parts))
    if isinstance(value, tuple | range):
        return list(value)
    if dataclasses.is_dataclass(value) and _CLASSES.get(type(value).__name__) is type(value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        parts = [type(value).__name__, fields]
        return msgpack.ExtType(_OBJECT, msgpack.packb(parts, default=_to_plain, strict_types=True))
    raise TypeError(f"an order cannot carry a {type(value).__name__}")


def _decode(body: bytes) -> Any:
    return msgpack.unpackb(body, ext_hook=_from_ext, strict_map_key=False)


def _from_ext(code: int, body: bytes) -> Any:
    if code == _ARRAY:
        dtype, shape, content = msgpack.unpackb(body)
        return np.frombuffer(content, np.dtype(dtype)).reshape(shape)
    name, fields = _decode(body)
    return _CLASSES[name](**fields)
