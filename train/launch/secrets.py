"""Keys and tokens on their way to the workers: never in a command, a log or a config.

A secret either lies in Secret Manager, where each worker fetches it for itself, or travels in a
file that only its owner may read. What is said aloud goes through `Redactor`.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
_VERSION = re.compile(r"latest|\d+")
# Whole words of a name: TOKENIZERS_PARALLELISM and MAX_NEW_TOKENS are no secrets.
_SOUNDS_SECRET = re.compile(
    r"(?i)(^|_)(TOKEN|SECRETS?|PASS(WORD|WD|PHRASE)?|PWD|CREDENTIALS?|API_?KEYS?|KEY|PRIVATE)(_|$)"
)
HIDDEN = "***"

# What tokens of these services look like, wherever they turn up.
_KNOWN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16}|ya29\.[A-Za-z0-9_-]{20,}|AIza[A-Za-z0-9_-]{30,}|gh[pousr]_[A-Za-z0-9]{30,}"
)


@dataclass(frozen=True)
class StoredSecret:
    """The environment variable `variable` with a secret of Secret Manager in it."""

    variable: str
    secret: str
    version: str = "latest"


@dataclass(frozen=True)
class Environment:
    """What the training process finds in its environment. forwarded: values of this machine that
    are secret; plain: values that are not."""

    plain: Mapping[str, str] = field(default_factory=dict)
    stored: Sequence[StoredSecret] = ()
    forwarded: Mapping[str, str] = field(default_factory=dict, repr=False)

    def script(self, project: str) -> str:
        """Shell that sets the plain values and fetches the stored ones. Holds no secret."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.plain.items()]
        for each in self.stored:
            fetch = shlex.join(
                [
                    "gcloud", "secrets", "versions", "access", each.version,
                    f"--secret={each.secret}", f"--project={project}",
                ]
            )  # fmt: skip
            # Two statements, because `export x=$(…)` would succeed even where fetching failed.
            lines += [f'{each.variable}="$({fetch})"', f"export {each.variable}"]
        return "".join(f"{line}\n" for line in lines)

    def forwarded_script(self) -> str:
        """Shell with the forwarded values: for a file of mode 0600 only."""
        return "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in self.forwarded.items()
        )


def read_environment(
    *,
    plain: Sequence[str],
    secrets: Sequence[str],
    forward: Sequence[str],
    local: Mapping[str, str],
) -> Environment:
    """From `NAME=VALUE`, `NAME=SECRET[:VERSION]` and `NAME` of the local environment.

    Raises ValueError, which never repeats a value.
    """
    values = {}
    for text in plain:
        name, equals, value = text.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            what = f"{name!r} is no name of a variable" if equals else "there is no = in it"
            raise ValueError(f"--env must be NAME=VALUE, such as --env JAX_LOG_COMPILES=1: {what}")
        if _SOUNDS_SECRET.search(name) or _KNOWN.search(value):
            raise ValueError(
                f"--env {name} looks like a secret, and commands are logged; use --secret "
                f"{name}=SECRET (Secret Manager) or --forward {name} (from this environment)"
            )
        if name in values:
            raise ValueError(f"{name} is set twice, by --env")
        values[name] = value
    stored = [_stored(text) for text in secrets]
    forwarded = {}
    for name in forward:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                "--forward takes the name of an environment variable, not its value: --forward "
                "HF_TOKEN"
            )
        if not local.get(name):
            raise ValueError(f"--forward {name}: it is not set in this environment")
        forwarded[name] = local[name]
    names = [*values, *(each.variable for each in stored), *forwarded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is set twice, by --env, --secret or --forward")
    return Environment(values, stored, forwarded)


def _stored(text: str) -> StoredSecret:
    name, equals, rest = text.partition("=")
    secret, colon, version = rest.partition(":")
    version = version if colon else "latest"
    fits = _SECRET_ID.fullmatch(secret) and _VERSION.fullmatch(version)
    # A token pasted in place of an id would pass for one: its shape gives it away.
    if not equals or not _VARIABLE.fullmatch(name) or not fits or _KNOWN.search(secret):
        raise ValueError(
            "--secret must be NAME=SECRET or NAME=SECRET:VERSION, where SECRET is the id of a "
            "secret in Secret Manager (not its value): --secret HF_TOKEN=hf-token"
        )
    return StoredSecret(name, secret, version)


class Redactor:
    """Takes secrets out of text: the given values, and whatever looks like a known token."""

    def __init__(self, values: Sequence[str] = ()):
        # The longest first, so that one that contains another is hidden whole. Short values, such
        # as "1", would turn logs into stars and hide nothing worth hiding.
        self._values = sorted((value for value in values if len(value) >= 6), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return _KNOWN.sub(HIDDEN, text)
