"""What can be asked of an endpoint? Its routes, as one ASGI app for uvicorn and Ray Serve alike."""

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import thawline
from thawline.cluster.errors import PredictError
from thawline.cluster.serve.endpoint.answers import as_answer
from thawline.cluster.serve.endpoint.asking import FIELD, Fetch, asked
from thawline.cluster.serve.endpoint.batching import Batcher, BusyError, ClosedError, Options
from thawline.cluster.serve.endpoint.receiving import Guard, RefusedError
from thawline.cluster.serve.endpoint.telemetry import Telemetry

_PREDICT = "/predict"
_PAGE = Path(__file__).with_name("page.html.j2")
_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_BODY: Mapping[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/json": {"schema": {"type": "object", "properties": {"url": {"type": "string"}}}},
        },
    }
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "For each image its name, prediction and what else its task has; or its error"},
    401: {"description": "The token is missing or wrong"},
    408: {"description": "The request took too long to arrive"},
    413: {"description": "The request or an image has too many bytes"},
    422: {"description": "The only image cannot be used, or an option does not fit"},
    429: {"description": "Too much is under way: see Retry-After"},
    504: {"description": "The answer took too long"},
}


def make_app(
    batcher: Batcher, telemetry: Telemetry, *, run: str, token: str | None = None, fetch: Fetch | None = None
) -> FastAPI:
    """The app. run: its name, for people. token: what /predict asks for. fetch: gets images by their URLs."""
    app = FastAPI(title=f"thawline: {run}", version=thawline.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=batcher.limits, telemetry=telemetry, guarded=_PREDICT, token=token)

    @app.post(_PREDICT, openapi_extra=dict(_BODY), responses=_ANSWERS, summary="What the model sees in images")
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=0, description="Name so many classes; 0: all")] = 0,
        threshold: Annotated[float | None, Query(ge=0, le=1, description="For images with several labels")] = None,
    ) -> Response:
        images = await asked(request, batcher.limits, fetch)
        try:
            said = await batcher.answers(images, Options(top_k, threshold))
        except TimeoutError:
            raise RefusedError(
                504, f"no answer within {batcher.limits.answer_s:g} s: send fewer images, or later", retry=True
            ) from None
        except BusyError:
            raise RefusedError(429, "too much is under way: send it again later", retry=True) from None
        except ClosedError:
            raise RefusedError(503, "the endpoint ends: send it to another", retry=True) from None
        except PredictError as error:
            raise RefusedError(422, str(error)) from None
        if len(said) == 1 and said[0].prediction.error is not None:
            raise RefusedError(422, f"the image cannot be used: {said[0].prediction.error}")
        return Response(await asyncio.to_thread(as_answer, said), media_type="application/json")

    _tell_state(app, batcher, telemetry)
    _show_page(app, run, asks=token is not None)
    _tell_errors(app)
    return app


def _tell_state(app: FastAPI, batcher: Batcher, telemetry: Telemetry) -> None:
    """What asks for no token: whether it lives and answers, and its numbers."""

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether images are answered")
    async def readyz() -> Response:
        ready = batcher.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics", summary="Telemetry, as Prometheus reads it")
    async def metrics() -> Response:
        return Response(telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _show_page(app: FastAPI, run: str, *, asks: bool) -> None:
    """Where a person drops a picture; it needs no network. asks: for a token."""
    page = Environment(autoescape=True).from_string(_PAGE.read_text(encoding="utf-8"))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        filled = page.render(run=run, nonce=nonce, token=asks)
        return HTMLResponse(filled, headers={"Content-Security-Policy": _POLICY.format(nonce=nonce)})


def _tell_errors(app: FastAPI) -> None:
    """Every error is a JSON object with a sentence."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong_option(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the image could not be answered: the log of the endpoint says why"}, 500)
