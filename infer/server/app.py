"""The ASGI application: routes, and what stands before them."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from infer.server.admin import Admin
from infer.server.errors import ApiError
from infer.server.generation import Context
from infer.server.guard import Guard, error_response
from infer.server.openapi import openapi, openapi_page
from infer.server.rest import VERSION_HEADER, Rest
from llama_jax import __version__

PAGE = Path(__file__).parent / "page.html"

# The page talks to this server only, whatever an answer's text may say.
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(context: Context) -> ASGIApp:
    description = openapi(__version__)
    description_page = openapi_page(__version__)
    page = PAGE.read_text(encoding="utf-8")

    async def show_openapi(request: Request) -> Response:
        return JSONResponse(description)

    async def show_docs(request: Request) -> Response:
        return HTMLResponse(description_page)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    routes = [
        *Rest(context).routes(),
        *Admin(context).routes(),
        Route("/openapi.json", show_openapi, methods=["GET"]),
        Route("/docs", show_docs, methods=["GET"]),
        Route("/", show_page, methods=["GET"]),
    ]
    app = _App(routes=routes, exception_handlers={HTTPException: _http_error, ApiError: _api_error})
    # A path with a slash too many is another path, not a reason to redirect.
    app.router.redirect_slashes = False
    settings = context.settings
    guarded = Guard(app, settings=settings, gate=context.gate, metrics=context.metrics)
    if not settings.cors_origins:
        return guarded
    return _Cors(
        guarded,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client in browsers sends a dozen of its own
        expose_headers=["x-request-id", VERSION_HEADER, "retry-after"],
    )


class _App(Starlette):
    """Without Starlette's own answer to unexpected errors: `Guard` gives one that is an object."""

    def build_middleware_stack(self) -> ASGIApp:
        return ExceptionMiddleware(self.router, handlers=self.exception_handlers)


class _Cors(CORSMiddleware):
    """Starlette's, which refuses in plain text, with error objects."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        told = error_response(ApiError(400, bytes(response.body).decode()), "")
        told.headers["vary"] = response.headers["vary"]
        return told


def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "this route does not take the method"}
    told = ApiError(error.status_code, message.get(error.status_code, error.detail))
    response = error_response(told, request.url.path)
    response.headers.update(error.headers or {})
    return response


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)
