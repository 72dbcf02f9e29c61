"""Admin routes: which versions are loaded and which answer. They need the admin key."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infer.server.body import read_body
from infer.server.generation import Context
from infer.server.validation import parse

Name = Annotated[str, Field(max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class VersionBody(_Body):
    model: Name
    version: Name


class ActivateBody(_Body):
    """share: of the requests, for a canary; all of them without it."""

    model: Name
    version: Name
    share: Annotated[float, Field(gt=0, le=1)] | None = None


class ModelBody(_Body):
    model: Name


class AdapterBody(_Body):
    """version: the active one without it."""

    model: Name
    adapter: Name
    version: Name | None = None


class Admin:
    def __init__(self, context: Context):
        self._context = context
        self._models = context.models

    def routes(self) -> list[Route]:
        return [
            Route("/admin/models", self.report, methods=["GET"]),
            Route("/admin/models/load", self.load, methods=["POST"]),
            Route("/admin/models/activate", self.activate, methods=["POST"]),
            Route("/admin/models/rollback", self.rollback, methods=["POST"]),
            Route("/admin/models/unload", self.unload, methods=["POST"]),
            Route("/admin/adapters/load", self.load_adapter, methods=["POST"]),
            Route("/admin/adapters/unload", self.unload_adapter, methods=["POST"]),
        ]

    async def report(self, request: Request) -> Response:
        self._check(request)
        return JSONResponse({"models": await asyncio.to_thread(self._models.reports.report)})

    async def load(self, request: Request) -> Response:
        body = await self._body(request, VersionBody)
        loaded = await self._models.load(body.model, body.version)
        state = self._models.watcher.state(loaded)
        return JSONResponse({"model": body.model, "version": body.version, "state": state})

    async def activate(self, request: Request) -> Response:
        body = await self._body(request, ActivateBody)
        state = await self._models.switches.activate(body.model, body.version, body.share)
        return JSONResponse({"model": body.model, **asdict(state)})

    async def rollback(self, request: Request) -> Response:
        body = await self._body(request, ModelBody)
        state = await self._models.switches.roll_back(body.model)
        return JSONResponse({"model": body.model, **asdict(state)})

    async def unload(self, request: Request) -> Response:
        body = await self._body(request, VersionBody)
        await self._models.unload(body.model, body.version)
        return JSONResponse({"model": body.model, "version": body.version, "state": "unloaded"})

    async def load_adapter(self, request: Request) -> Response:
        body = await self._body(request, AdapterBody)
        version = self._version(body)
        await self._models.add_adapter(body.model, version, body.adapter)
        return JSONResponse({"model": f"{body.model}:{body.adapter}", "version": version})

    async def unload_adapter(self, request: Request) -> Response:
        body = await self._body(request, AdapterBody)
        version = self._version(body)
        await self._models.remove_adapter(body.model, version, body.adapter)
        return JSONResponse({"model": body.model, "version": version, "removed": body.adapter})

    def _version(self, body: AdapterBody) -> str:
        return self._models.active_version(body.model) if body.version is None else body.version

    def _check(self, request: Request) -> None:
        self._context.gate.check_admin(request.scope["visit"].arrival.caller)

    async def _body(self, request: Request, kind: Any) -> Any:
        self._check(request)
        return parse(kind, await read_body(request, self._context.settings))
