"""The OpenAPI description, made from the request types, and a page that shows it."""

import html
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from infer.server.admin import ActivateBody, AdapterBody, ModelBody, VersionBody
from infer.server.api_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

_REF = "#/components/schemas/{model}"

# (path, method, what it does, its body, media types of a good answer, statuses of bad ones)
_JSON, _STREAM = "application/json", "text/event-stream"
_ASK = (400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504)
_ADMIN = (400, 401, 403, 404, 408, 409, 413, 415, 431, 500, 503)
_Operation = tuple[str, str, str, type[BaseModel] | None, tuple[str, ...], tuple[int, ...]]
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_OPERATIONS: tuple[_Operation, ...] = (
    ("/healthz", "get", "Whether the process is alive", None, (_JSON,), ()),
    ("/readyz", "get", "Whether models are loaded and warm", None, (_JSON,), (503,)),
    ("/metrics", "get", "Metrics for Prometheus", None, ("text/plain",), (401,)),
    ("/v1/models", "get", "What a request may name", None, (_JSON,), (401,)),
    ("/v1/models/{model}", "get", "One of them", None, (_JSON,), (401, 404)),
    (_CHAT, "post", "The next turn of a conversation", ChatRequest, (_JSON, _STREAM), _ASK),
    (_COMPLETIONS, "post", "Texts that go on", CompletionRequest, (_JSON, _STREAM), _ASK),
    ("/v1/embeddings", "post", "Vectors of texts", EmbeddingRequest, (_JSON,), _ASK),
    ("/tokenize", "post", "A text's tokens", TokenizeRequest, (_JSON,), _ASK),
    ("/detokenize", "post", "Tokens' text", DetokenizeRequest, (_JSON,), _ASK),
    ("/admin/models", "get", "Every version and where it stands", None, (_JSON,), (401, 403)),
    ("/admin/models/load", "post", "Load a version", VersionBody, (_JSON,), _ADMIN),
    ("/admin/models/activate", "post", "Let a version answer", ActivateBody, (_JSON,), _ADMIN),
    ("/admin/models/rollback", "post", "Back to the version before", ModelBody, (_JSON,), _ADMIN),
    ("/admin/models/unload", "post", "Unload a version", VersionBody, (_JSON,), _ADMIN),
    ("/admin/adapters/load", "post", "Load an adapter", AdapterBody, (_JSON,), _ADMIN),
    ("/admin/adapters/unload", "post", "Unload an adapter", AdapterBody, (_JSON,), _ADMIN),
)  # fmt: skip
OPEN_OPERATIONS = ("/healthz", "/readyz")

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(version: str) -> dict[str, Any]:
    """The description of a server of this version, as OpenAPI 3.1."""
    bodies = [body for _, _, _, body, _, _ in _OPERATIONS if body is not None]
    _, definitions = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies)], ref_template=_REF
    )
    paths: dict[str, Any] = {}
    for path, method, summary, body, media, errors in _OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(path, summary, body, media, errors)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama-jax", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    path: str,
    summary: str,
    body: type[BaseModel] | None,
    media: tuple[str, ...],
    errors: tuple[int, ...],
) -> dict[str, Any]:
    good = {"description": "Done", "content": {each: {"schema": {}} for each in media}}
    bad = {"schema": {"$ref": _REF.format(model="Error")}}
    # Readiness says 503 in the form of its good answer.
    failed = {"schema": {}} if path == "/readyz" else bad
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": good,
            **{str(e): {"description": "Refused", "content": {_JSON: failed}} for e in errors},
        },
        "security": [] if path in OPEN_OPERATIONS else [{"key": []}],
    }
    if body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def openapi_page(version: str) -> str:
    """A page without scripts or outside assets: routes and the fields of their bodies."""
    description = openapi(version)
    schemas = description["components"]["schemas"]
    parts = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                ref = operation["requestBody"]["content"][_JSON]["schema"]["$ref"]
                parts.append(_fields(schemas[ref.rsplit("/", 1)[1]]))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>llama-jax API</title>"
        "<style>body{font:15px/1.5 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "h2{font-size:1.05rem;margin-top:2rem}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
        "</style><h1>llama-jax API</h1><p>As OpenAPI: <a href='openapi.json'>openapi.json</a></p>"
        f"{''.join(parts)}</html>"
    )


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{html.escape(name)}</code>{' (required)' if name in required else ''}"
        f"<td>{html.escape(_type(field))}"
        for name, field in schema["properties"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"].rsplit("/", 1)[1])
    if "enum" in field or "const" in field:
        return ", ".join(map(repr, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
