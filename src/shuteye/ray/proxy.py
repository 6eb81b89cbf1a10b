"""What Ray Serve's proxy adds to every answer, and the application must not add again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shuteye.server.http.middleware import REQUEST_ID_HEADER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class LeaveRequestIds:
    """ASGI middleware: takes the request's id out of the answer; the proxy, which gave it, puts it there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", ()) if name != REQUEST_ID_HEADER]
                message = {**message, "headers": kept}
            await send(message)

        await self.app(scope, receive, send_without)
