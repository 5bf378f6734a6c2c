"""The HTTP face of a `ChatModel`: POST /v1/chat/completions, GET /v1/models, GET /health."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from ling_flow.errors import UserError
from ling_flow.serving.chat import ChatModel, Completion, answer, chunks
from ling_flow.serving.protocol import ChatRequest


def build_app(chat: ChatModel, model_name: str, fingerprint: str) -> FastAPI:
    """The application; `fingerprint` is the identity of the artifact that it serves, told by /v1/models and /health."""
    app = FastAPI(title="ling_flow", docs_url=None, redoc_url=None)
    started = int(time.time())

    # Plain functions: FastAPI runs them on threads, so that /health answers while tokens are computed.
    @app.post("/v1/chat/completions", response_model=None)
    def complete(request: ChatRequest) -> Any:
        if request.model not in (None, model_name):
            message = f"model: {request.model!r} is not served here; {model_name!r} is"
            return _error(404, message, "model", "model_not_found")
        completion = chat.start(request)
        if request.stream:
            events = _events(completion, model_name, request.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return answer(completion, model_name)

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
        return _error(400, f"{field}: {message}" if field else message, field or None, None)

    return app


def _events(completion: Completion, model_name: str, include_usage: bool) -> Iterator[str]:
    for chunk in chunks(completion, model_name, include_usage):
        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def _error(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)
