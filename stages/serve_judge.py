"""A judge's endpoint on this machine: a local causal LM behind OpenAI's chat completions.

It fills in the JSON schema of a request by log-probability (`stages.choice`), so that a model of
any size answers in form. It listens on the loopback alone, answers no request that names another
host, and needs no key.
"""

import asyncio
import hashlib
import json
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stages.choice import Chooser, TooLong

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 4_000_000


def serve(
    model: str, *, port: int, dtype: str, num_threads: int, ready: Callable[[str], object]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        model: as in params.yaml: a folder, a hub id or `package:...`.
        port: of the loopback; 0 takes a free one.
        dtype: of the matrix products.
        num_threads: other counts give other bits.
        ready: told the address and the model's name when requests are welcome.
    """
    chooser = Chooser(model, dtype=dtype, num_threads=num_threads)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"--port: cannot be used, got {port} ({error.strerror}); take another, or 0"
            ) from error
        listener.listen()
        ready(f"base_url: http://{HOST}:{listener.getsockname()[1]}/v1\nmodel: {chooser.name}")
        config = uvicorn.Config(application(chooser), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


def application(chooser: Chooser) -> FastAPI:
    app = FastAPI(openapi_url=None)
    # Whoever reaches the port through a name of their own (DNS rebinding) is turned away.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    one_at_a_time = asyncio.Lock()

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": chooser.name, "object": "model"}]}

    async def chat_completions(request: Request) -> JSONResponse:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_REQUEST_BYTES:
                return _error(413, f"the request is larger than {MAX_REQUEST_BYTES} bytes")
        try:
            model, messages, schema = _asked(body)
            if model != chooser.name:
                return _error(404, f"no model '{model}'; this is '{chooser.name}'")
            async with one_at_a_time:
                reply = await asyncio.to_thread(chooser.reply, messages, schema)
        except TooLong as error:
            return _error(400, str(error), code="context_length_exceeded")
        except ValueError as error:
            return _error(400, str(error))
        used = reply.prompt_tokens + reply.completion_tokens
        return JSONResponse(
            {
                "id": f"chatcmpl-{hashlib.sha256(body).hexdigest()[:16]}",
                "object": "chat.completion",
                "created": 0,
                "model": chooser.name,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": reply.text, "refusal": None},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": reply.prompt_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "total_tokens": used,
                },
            }
        )

    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    return app


def _asked(body: bytes) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
    """Model, messages and schema of a request.

    Raises:
        ValueError: if it lacks one of them.
    """
    try:
        match json.loads(body):
            case {
                "model": str(model),
                "messages": [_, *_] as messages,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": dict(schema)},
                },
            }:
                return model, [_message(message) for message in messages], schema
            case _:
                pass
    except RecursionError:
        pass
    raise ValueError(
        "the request must have a model, messages, and a response_format of type json_schema: "
        "this server fills in forms and writes nothing of its own"
    )


def _message(message: Any) -> tuple[str, str]:
    match message:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return role, content
        case _:
            raise ValueError("a message must have a role and its content as one string")


def _error(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return JSONResponse({"error": error}, status_code=status)
