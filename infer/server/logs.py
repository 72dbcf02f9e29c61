"""The log: one JSON object a line on standard error, with secrets blanked and no prompts.

Messages of exceptions may quote what a client sent, so of an unexpected one only its type and the
places it came through are written; `log_error_messages` adds its message.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

# Of the environment; others of the kind may be in a message of a library.
SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "LLAMA_JAX_API_KEY",
    "LLAMA_JAX_ADMIN_KEY",
)
SHORTEST_SECRET = 6

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def environment_secrets() -> list[str]:
    return [os.environ[name] for name in SECRET_VARIABLES if os.environ.get(name)]


class JsonFormatter(logging.Formatter):
    """`extra` fields of a record become fields of its object."""

    def __init__(self, secrets: Iterable[str] = (), *, show_messages: bool = False):
        super().__init__()
        # The longest first: one may contain another.
        self._secrets = sorted(
            {each for each in secrets if len(each) >= SHORTEST_SECRET}, key=len, reverse=True
        )
        self._show_messages = show_messages

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = self._described(record.exc_info[1])
        return self.blank(json.dumps(entry, default=str))

    def blank(self, text: str) -> str:
        for secret in self._secrets:
            # As it stands, and as JSON spells it.
            text = text.replace(secret, "***").replace(json.dumps(secret)[1:-1], "***")
        return text

    def _described(self, error: BaseException) -> dict[str, Any]:
        frames = traceback.extract_tb(error.__traceback__)
        described: dict[str, Any] = {
            "type": type(error).__name__,
            "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
        }
        if self._show_messages:
            described["message"] = str(error)
        if error.__cause__ is not None:
            described["cause"] = self._described(error.__cause__)
        return described


def set_up_logging(level: str, secrets: Iterable[str], *, show_messages: bool) -> None:
    """Every logger of the process writes JSON lines from here on."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter([*secrets, *environment_secrets()], show_messages=show_messages)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for ours in ("llama_jax", "infer", "uvicorn"):
        logging.getLogger(ours).setLevel(level.upper())
    # Its lines would hold the whole address; ours hold the path alone.
    logging.getLogger("uvicorn.access").disabled = True
