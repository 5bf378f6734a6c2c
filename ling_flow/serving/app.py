"""The HTTP face of a `ChatModel`: POST /v1/chat/completions, GET /v1/models, GET /health."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from ling_flow.errors import UserError
from ling_flow.redact import redact
from ling_flow.serving.chat import ChatModel, Completion, answer, chunks
from ling_flow.serving.protocol import ChatRequest

_log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks whether the client is still there


def build_app(chat: ChatModel, model_name: str, fingerprint: str) -> FastAPI:
    """The application; `fingerprint` is the identity of the artifact that it serves, told by /v1/models and /health."""
    app = FastAPI(title="ling_flow", docs_url=None, redoc_url=None)
    started = int(time.time())

    # Tokens are computed on threads, so that /health answers meanwhile.
    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: ChatRequest, connection: Request) -> Any:
        if request.model not in (None, model_name):
            message = f"model: {request.model!r} is not served here; {model_name!r} is"
            return _error(404, message, "model", "model_not_found")
        completion = await run_in_threadpool(chat.start, request)
        if request.stream:
            events = _events(completion, model_name, request.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return await _whole(completion, model_name, connection)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        card = {
            "id": model_name,
            "object": "model",
            "created": started,
            "owned_by": "ling_flow",
            "fingerprint": fingerprint,
            "max_model_len": chat.context_length,
        }
        return {"object": "list", "data": [card]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": model_name, "fingerprint": fingerprint}

    @app.exception_handler(UserError)
    def user_error(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error), str(error).partition(":")[0], None)

    @app.exception_handler(RequestValidationError)
    def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown or unsupported field"
        if first["type"] == "json_invalid":
            field, message = "", f"the body is not valid JSON: {first['ctx']['error']}"
        return _error(400, f"{field}: {message}" if field else message, field or None, None)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail, None, None)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_failure(error), status_code=500)

    return app


async def _whole(completion: Completion, model_name: str, connection: Request) -> JSONResponse:
    """The whole answer; one that nobody waits for any more is not written to its end."""
    writing = asyncio.ensure_future(run_in_threadpool(answer, completion, model_name))
    while not (await asyncio.wait({writing}, timeout=LOOK_SECONDS))[0]:
        if await connection.is_disconnected():
            completion.close()
    try:
        return JSONResponse(await writing)
    except Exception as error:  # also a UserError: the request was checked before, so the client is not to blame
        return JSONResponse(_broken_off(error), status_code=500)


async def _events(completion: Completion, model_name: str, include_usage: bool) -> AsyncIterator[str]:
    try:
        async for chunk in iterate_in_threadpool(chunks(completion, model_name, include_usage)):
            yield _event(chunk)
    except Exception as error:  # the status 200 is sent: an event must tell
        yield _event(_broken_off(error))
    finally:
        completion.close()
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _error(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _broken_off(error: Exception) -> dict[str, Any]:
    """`_failure` of an answer that was being computed."""
    body = _failure(error)
    traceback.clear_frames(error.__traceback__)  # they would hold the answer's cache until garbage is collected
    return body


def _failure(error: Exception) -> dict[str, Any]:
    """The body that tells of a failure of ours, whose traceback is logged."""
    _log.error("a request failed", exc_info=error)
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
    message = f"the server could not answer: {redact(reason)}"
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
