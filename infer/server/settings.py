"""What a server is started with. `settings_reader` makes it from flags, variables and a file.

Nothing but the standard library here: the command line reads the fields for its flags before the
packages of the `serve` extra are needed.
"""

import dataclasses
import math
import re
import threading
from dataclasses import dataclass, field
from typing import Any

# Whom requests of the server's own are counted under.
ADMIN, PROBE = OWN_CALLERS = ("admin", "probe")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Secret:
    """A text that is never shown: printing or formatting it gives ***. `reveal` gives it."""

    __slots__ = ("_text",)

    def __init__(self, text: str):
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__


def _check_key(where: str, key: Any) -> None:
    text = key.reveal() if isinstance(key, Secret) else ""
    if len(text) < 8 or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{where} must be a text of at least 8 ASCII characters without spaces")


@dataclass(frozen=True)
class Tenant:
    """Who may ask, and how much. None is no limit.

    key: what the client sends as `Authorization: Bearer KEY`. requests_per_minute: refilled
    evenly, so a minute's worth may come at once. concurrent_requests: running or waiting.
    priority: lower is served first.
    """

    name: str
    key: Secret
    requests_per_minute: float | None = None
    concurrent_requests: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"tenants: the name {self.name!r} must be 1 to 64 letters, digits, dots, dashes"
            )
        _check_key(f"tenants: the key of {self.name}", self.key)
        where = f"tenants: of {self.name}"
        _check_limit(where, "requests_per_minute", self.requests_per_minute, float)
        _check_limit(where, "concurrent_requests", self.concurrent_requests, int)
        if type(self.priority) is not int:
            raise ValueError(f"{where}, priority is {self.priority!r}; it must be an integer")


def _check_limit(where: str, name: str, value: Any, kind: type) -> None:
    if value is None:
        return
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < math.inf:
        noun = "a number" if kind is float else "an integer"
        raise ValueError(f"{where}, {name} is {value!r}; it must be {noun} above 0")


def _setting(
    default: Any, help: str, *, low: float | None = None, above: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "above": above})


@dataclass(frozen=True)
class Settings:
    """Every setting of a server. Help texts are in the fields' metadata; see docs/serving.md."""

    models: tuple[str, ...] = _setting((), "MODEL or NAME=MODEL, loaded at start")
    models_dir: str | None = _setting(None, "the registry: a folder models/NAME/VERSION/")
    host: str = _setting("127.0.0.1", "the address to listen on; 0.0.0.0 is every one")
    port: int = _setting(8000, "the port of REST; 0 takes a free one", low=0)
    grpc_port: int | None = _setting(None, "the port of gRPC; 0 takes a free one", low=0)

    api_key: Secret | None = field(default=None, metadata={"help": "the key clients must send"})
    admin_key: Secret | None = field(
        default=None, metadata={"help": "the key of the admin routes, which are off without"}
    )
    tenants: tuple[Tenant, ...] = field(default=(), metadata={"yaml_only": True})
    open_metrics: bool = _setting(False, "/metrics answers without a key")
    cors_origins: tuple[str, ...] = _setting((), "origins of other sites that browsers may use")
    requests_per_minute: float | None = _setting(
        None, "of every tenant that has no limit of its own", above=0
    )
    concurrent_requests: int | None = _setting(
        None, "of every tenant that has no limit of its own", low=1
    )

    queue_limit: int = _setting(256, "requests that may wait for the engine", low=1)
    request_timeout_seconds: float = _setting(600.0, "from arrival to the end", above=0)
    drain_seconds: float = _setting(30.0, "that running requests get after SIGTERM", low=0)
    head_timeout_seconds: float = _setting(10.0, "for a request's line and headers", above=0)
    body_timeout_seconds: float = _setting(30.0, "for a request's body", above=0)
    write_timeout_seconds: float = _setting(30.0, "that a client may read nothing", above=0)
    keep_alive_seconds: float = _setting(75.0, "that an idle connection stays open", low=0)
    max_connections: int = _setting(2048, "open at once", low=1)
    max_body_bytes: int = _setting(4 * 2**20, "of a request, unpacked", low=1)
    max_header_bytes: int = _setting(32 * 2**10, "of all headers together", low=1024)
    max_headers: int = _setting(100, "of a request", low=1)
    max_choices: int = _setting(16, "n of a request times its prompts", low=1)
    max_prompts: int = _setting(64, "of one completion or embedding request", low=1)
    max_messages: int = _setting(1024, "of one chat request", low=1)
    max_tools: int = _setting(128, "of one chat request", low=1)
    max_schema_bytes: int = _setting(64 * 2**10, "of a schema, pattern or grammar", low=1)
    max_tokens: int | None = _setting(
        None, "that a request may ask for, and gets at most; None is the context", low=1
    )

    load_on_demand: bool = _setting(True, "a request loads a registered model that is not loaded")
    max_loaded: int = _setting(4, "versions in memory at once", low=1)
    idle_unload_seconds: float | None = _setting(
        None, "after which an unused version of the registry is unloaded", low=0
    )
    verify_hashes: bool = _setting(True, "read and hash every file of a version before loading it")
    adapters: tuple[str, ...] = _setting((), "NAME=FOLDER or MODEL:NAME=FOLDER, loaded at start")
    max_adapters: int = _setting(0, "LoRA adapters beside a model at once", low=0)
    max_lora_rank: int = _setting(16, "of those adapters", low=1)

    max_slots: int = _setting(16, "choices computed together", low=1)
    max_context: int | None = _setting(
        None,
        "tokens of prompt and answer; None is what the model was made for. More is refused, but a "
        "model of models_dir that was made for less keeps its own",
    )
    cache_tokens: int | None = _setting(
        None, "that running requests and cached prefixes may hold; None is every slot full", low=1
    )
    draft_tokens: int = _setting(0, "guessed and checked in one step", low=0)
    draft_model: str | None = _setting(
        None, "a small MODEL that guesses them; None looks in the text before"
    )
    block_size: int = _setting(
        32, "tokens of a block: prefixes are shared, and pages held, in blocks", low=1
    )
    piece_tokens: int = _setting(128, "of a prompt, read between two steps of others", low=1)
    cache: str | None = _setting(None, "slots or pages; None is pages on TPUs and on a mesh")
    mesh: str | None = _setting(None, "devices that share the model, such as tensor=4")
    quantization: str | None = _setting(
        None, "int8, int4, nf4, fp8, int8-dynamic, int4-dynamic or fp8-dynamic, made while loading"
    )
    exact: bool = _setting(True, "no answer depends on who else asks; without, one alone is faster")
    dtype: str | None = _setting(None, "of computation; None is the rule of generate")
    cache_dtype: str | None = _setting(
        None, "of keys and values that are kept, int8 among others; None is that of computation"
    )
    otlp_endpoint: str | None = _setting(
        None, "URL that traces of requests are sent to, by OTLP over HTTP"
    )
    # What `llama-jax fit --serve` compiles for, and a start checks: a slice by its name, and the
    # shapes of the model and of the draft model, by those of presets.
    slice: str | None = field(default=None, metadata={"yaml_only": True})
    architecture: str | None = field(default=None, metadata={"yaml_only": True})
    draft_architecture: str | None = field(default=None, metadata={"yaml_only": True})
    log_level: str = _setting("info", "debug, info, warning or error")
    log_error_messages: bool = _setting(
        False, "log the words of unexpected errors, which may quote prompts"
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            low, above = each.metadata.get("low"), each.metadata.get("above")
            if low is not None and value < low:
                raise ValueError(f"{each.name} is {value!r}; it must be at least {low:g}")
            if above is not None and not value > above:
                raise ValueError(f"{each.name} is {value!r}; it must be above {above:g}")
            if each.name.endswith("_seconds") and value > threading.TIMEOUT_MAX:
                raise ValueError(
                    f"{each.name} is {value!r}; it must be at most {threading.TIMEOUT_MAX:g}"
                )
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError(
                f"log_level is {self.log_level!r}; it is debug, info, warning or error"
            )
        for name in ("port", "grpc_port"):
            if (getattr(self, name) or 0) > 65535:
                raise ValueError(f"{name} is {getattr(self, name)}; ports end at 65535")
        if self.models_dir == "":
            raise ValueError("models_dir is empty; name the folder, or leave it out")
        endpoint = self.otlp_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint is {endpoint!r}; it must be a URL of http or https")
        if not self.host:
            raise ValueError("host is empty, which would be every address; write 0.0.0.0 for that")
        if self.draft_model is not None and not self.draft_tokens:
            raise ValueError(
                "draft_model is given and draft_tokens is 0; say how many tokens it guesses at a "
                "time, such as 3"
            )
        if self.draft_architecture is not None and self.draft_model is None:
            raise ValueError(
                f"draft_architecture is {self.draft_architecture!r} and there is no draft_model; "
                f"give one or leave both out"
            )
        if self.max_lora_rank != Settings.max_lora_rank and not self.max_adapters:
            raise ValueError(
                f"max_lora_rank is {self.max_lora_rank} and max_adapters is 0, so that no adapter "
                f"has a rank; set max_adapters, or leave it out"
            )
        if not self.models and self.models_dir is None:
            raise ValueError("nothing to serve: give a MODEL, or --models-dir")
        for name in ("load_on_demand", "idle_unload_seconds", "verify_hashes"):
            value = getattr(self, name)
            if value != getattr(Settings, name) and self.models_dir is None:
                raise ValueError(
                    f"{name} is {value!r}, which is about versions of a registry, but there is no "
                    f"models_dir; give one, or leave it out"
                )
        if len(self.models) > self.max_loaded:
            raise ValueError(
                f"{len(self.models)} models are given, which stay loaded, but max_loaded is "
                f"{self.max_loaded}; raise it, or give fewer"
            )
        self._check_keys()

    def _check_keys(self) -> None:
        keys = [tenant.key.reveal() for tenant in self.all_tenants]
        if self.admin_key is not None:
            _check_key("admin_key", self.admin_key)
            keys.append(self.admin_key.reveal())
        if len(set(keys)) != len(keys):
            raise ValueError("two of the keys (tenants, admin) are the same; each must be its own")
        names = [tenant.name for tenant in self.all_tenants]
        if len(set(names)) != len(names):
            raise ValueError(f"tenants: a name appears twice among {', '.join(names)}")
        for name in names:
            if name in OWN_CALLERS:
                raise ValueError(f"tenants: the name {name} is the server's own; choose another")

    @property
    def all_tenants(self) -> tuple[Tenant, ...]:
        if self.api_key is None:
            return self.tenants
        _check_key("api_key", self.api_key)
        return (*self.tenants, Tenant("default", self.api_key))

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every value that may not be shown anywhere."""
        keys = [tenant.key.reveal() for tenant in self.all_tenants]
        return tuple(keys if self.admin_key is None else [*keys, self.admin_key.reveal()])


def flag_fields() -> list[dataclasses.Field[Any]]:
    """The settings that have a flag and a variable."""
    return [
        each
        for each in dataclasses.fields(Settings)
        if not each.metadata.get("yaml_only") and each.name != "models"
    ]


def setting_names() -> list[str]:
    """All that have a value that a text can spell."""
    return [each.name for each in dataclasses.fields(Settings) if each.name != "tenants"]
