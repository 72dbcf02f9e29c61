"""Who asks, whether they may, and how much. The same for REST and gRPC."""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from infer.server.errors import ApiError
from infer.server.settings import ADMIN, Settings, Tenant

ANONYMOUS = ""


@dataclass(frozen=True)
class Caller:
    """tenant: its name; empty on a server without keys."""

    tenant: str
    is_admin: bool
    priority: int = 0


class Gate:
    """Knows the keys and counts what each tenant has running."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic):
        self._tenants = [(_digest(each.key.reveal()), each) for each in settings.all_tenants]
        admin = settings.admin_key
        self._admin = None if admin is None else _digest(admin.reveal())
        self._settings = settings
        self._usage: dict[str, _Usage] = {}
        self._clock = clock

    @property
    def is_open(self) -> bool:
        """Whether there are no keys, so that anyone may ask."""
        return not self._tenants

    def identify(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises ApiError 401.

        Basic is understood beside Bearer, with the key as password, because it is what browsers
        offer for the page.
        """
        given = None if authorization is None else _digest(_key_of(authorization))
        # Every key is compared, always: the time tells neither which nor how much was right.
        matching = None
        for digest, tenant in self._tenants:
            if given is not None and hmac.compare_digest(digest, given):
                matching = tenant
        is_admin = (
            given is not None
            and self._admin is not None
            and hmac.compare_digest(self._admin, given)
        )
        if matching is not None:
            return Caller(matching.name, is_admin=False, priority=matching.priority)
        if is_admin:
            return Caller(ADMIN, is_admin=True)
        if self.is_open:
            # Whatever key was sent: the openai package insists on sending one.
            return Caller(ANONYMOUS, is_admin=False)
        message = (
            "no API key: send the header 'Authorization: Bearer KEY'"
            if given is None
            else "the API key is not known"
        )
        raise ApiError(401, message, code="invalid_api_key")

    def check_admin(self, caller: Caller) -> None:
        if self._admin is None:
            raise ApiError(
                403, "the admin routes are off: start the server with an admin key", code="no_admin"
            )
        if not caller.is_admin and caller.tenant == ANONYMOUS:
            raise ApiError(
                401, "this needs the admin key: send 'Authorization: Bearer KEY'", code="no_key"
            )
        if not caller.is_admin:
            raise ApiError(403, "this needs the admin key", code="not_admin")

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """Counts one generation of the caller's while it runs. Raises ApiError 429."""
        usage = self._usage_of(caller)
        usage.enter(caller.tenant, self._clock())
        try:
            yield
        finally:
            usage.running -= 1

    def _usage_of(self, caller: Caller) -> "_Usage":
        if caller.tenant not in self._usage:
            own: Tenant | None = next(
                (tenant for _, tenant in self._tenants if tenant.name == caller.tenant), None
            )
            rate = None if own is None else own.requests_per_minute
            concurrent = None if own is None else own.concurrent_requests
            self._usage[caller.tenant] = _Usage(
                self._settings.requests_per_minute if rate is None else rate,
                self._settings.concurrent_requests if concurrent is None else concurrent,
                self._clock(),
            )
        return self._usage[caller.tenant]


class _Usage:
    """A bucket of requests that refills evenly, and a count of those running."""

    def __init__(self, per_minute: float | None, concurrent: int | None, now: float):
        self.per_minute, self.concurrent = per_minute, concurrent
        self.running = 0
        self._allowance = 0.0 if per_minute is None else max(1.0, per_minute)
        self._last = now

    def enter(self, tenant: str, now: float) -> None:
        who = f"tenant {tenant}" if tenant else "this server"
        if self.concurrent is not None and self.running >= self.concurrent:
            raise ApiError(
                429,
                f"{who} may have {self.concurrent} requests at once, and has",
                code="concurrency_limit_exceeded",
                retry_after_seconds=1,
            )
        if self.per_minute is not None:
            full = max(1.0, self.per_minute)
            refilled = (now - self._last) * self.per_minute / 60
            self._allowance, self._last = min(full, self._allowance + refilled), now
            if self._allowance < 1:
                wait = (1 - self._allowance) * 60 / self.per_minute
                raise ApiError(
                    429,
                    f"{who} may send {self.per_minute:g} requests a minute",
                    code="rate_limit_exceeded",
                    retry_after_seconds=wait,
                )
            self._allowance -= 1
        self.running += 1


def _digest(key: str) -> bytes:
    # Equal lengths, whatever the keys': compare_digest tells lengths apart.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(authorization: str) -> str:
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(rest.strip(), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return ""
        return decoded.partition(":")[2]
    return ""
