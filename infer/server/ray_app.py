"""The server as a Ray Serve application: replicas, autoscaling, rolling updates.

    serve run infer.server.ray_app:application config=serve.yaml min_replicas=2 max_replicas=8

Each replica holds the whole server behind REST; Ray's proxy shares out the requests, to the less
busy of two replicas at a time. Settings of sockets (host, port, timeouts of reading and writing)
are Ray's business and have no effect here; there is no gRPC.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ray import serve

from infer.server.app import make_app
from infer.server.build import given_sources, make_build
from infer.server.loaded import Build
from infer.server.run import make_context
from infer.server.settings import Settings
from infer.server.settings_reader import read_settings
from llama_jax.config import check_keys


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How many replicas there are, and on what.

    target_ongoing_requests: of a replica, running and waiting; Ray adds replicas above it and takes
    some away below it. num_cpus, num_tpus: what each replica gets; a replica runs on one host.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 16.0
    downscale_delay_seconds: float = 600.0
    num_cpus: float = 1.0
    num_tpus: int = 0

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            allowed = (int,) if each.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed) or value < 0:
                raise ValueError(f"{each.name} is {value!r}; it must be a number of at least 0")
        if not self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; the "
                f"second must be at least 1 and no less than the first"
            )
        if self.target_ongoing_requests <= 0:
            raise ValueError("target_ongoing_requests must be above 0")


@serve.ingress()
class Replica:
    """One server in a process of Ray's. make: gives what loads a source."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: Settings, make: Callable[[Settings], Build]
    ):
        from infer.server.logs import set_up_logging
        from llama_jax.commands.startup import start_jax

        set_up_logging(
            settings.log_level, settings.secrets, show_messages=settings.log_error_messages
        )
        start_jax()
        self._context = make_context(settings, make(settings), given_sources(settings))
        # Ray sends requests once this is done, which makes it the readiness of a replica.
        await self._context.models.start()

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._context)

    async def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self._context.models.condition == "starting":
            raise RuntimeError("the models are not loaded")

    async def __del__(self) -> None:
        # Ray has waited for the requests by now.
        if hasattr(self, "_context"):
            await self._context.models.stop(0)


def make_application(
    settings: Settings,
    scaling: Scaling,
    *,
    make: Callable[[Settings], Build] = make_build,
) -> Any:
    """The application for `serve.run`."""
    resources = {"TPU": scaling.num_tpus} if scaling.num_tpus else {}
    deployment = serve.deployment(
        name="llama-jax",
        num_replicas=None,
        # As many as run and wait in a replica; the rest waits in Ray's proxy, up to as many.
        max_ongoing_requests=settings.max_slots + settings.queue_limit,
        max_queued_requests=settings.queue_limit,
        ray_actor_options={"num_cpus": scaling.num_cpus, "resources": resources},
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "initial_replicas": max(1, scaling.min_replicas),
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "downscale_delay_s": scaling.downscale_delay_seconds,
        },
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2,
    )
    return deployment(Replica).bind(settings, make)


def application(args: dict[str, Any]) -> Any:
    """The application from the arguments of `serve run` or of a Ray config file.

    config: a YAML file of settings; the others are the fields of `Scaling`. LLAMA_JAX_… variables
    count too. Raises ValueError.
    """
    given = dict(args)
    config = given.pop("config", None)
    fields = {each.name: each.type for each in dataclasses.fields(Scaling)}
    check_keys("the application", given, ["config", *fields])
    numbers = {}
    for name, value in given.items():
        # From a command line they are texts.
        kind: Any = fields[name]
        try:
            numbers[name] = kind(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(f"{name} is {value!r}; it must be a number") from None
    return make_application(read_settings({}, config=config), Scaling(**numbers))
