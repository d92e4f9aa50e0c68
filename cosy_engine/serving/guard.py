"""Limits and headers for all that goes in and out of the page."""

from __future__ import annotations

import os

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEGABYTE = 1024 * 1024
_MAX_EVENT = 4 * MEGABYTE  # what a click sends: texts and settings, never sound
_FORM = MEGABYTE  # what an upload is wrapped in
_UPLOAD = "/gradio_api/upload"
_FILE = ("/gradio_api/file=", "/gradio_api/file/")
_ELSEWHERE = tuple(f"{route}http" for route in _FILE)


class Guard:
    """ASGI middleware around Gradio's application.

    It refuses bodies beyond a size, whatever their declared length, and requests to fetch from another site, for which
    Gradio's file route would serve as an open proxy. Files are marked as one visitor's own, so that no proxy keeps
    them.

    Args:
        max_upload_mb: the largest recording that is taken.
    """

    def __init__(self, app: ASGIApp, max_upload_mb: int) -> None:
        self._app = app
        self._max_upload_mb = max_upload_mb
        framed_by = "'self' https://huggingface.co https://*.hf.space" if os.environ.get("SPACE_ID") else "'self'"
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
            "Content-Security-Policy": f"frame-ancestors {framed_by}",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].lower()
        limit = self._max_upload_mb * MEGABYTE + _FORM if _UPLOAD in path else _MAX_EVENT
        too_large = f"Too much was sent at once; a recording may have {self._max_upload_mb} MB."
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, too_large)
            return message

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                if any(route in path for route in _FILE):
                    headers["Cache-Control"] = "private"
            await send(message)

        declared = Headers(scope=scope).get("content-length", "0")
        if any(route in path for route in _ELSEWHERE):
            answer: ASGIApp = PlainTextResponse("Files of other sites are not fetched.", 403)
        elif declared.isdigit() and int(declared) > limit:
            answer = PlainTextResponse(too_large, 413)
        else:
            answer = self._app
        await answer(scope, receive_limited, send_marked)
