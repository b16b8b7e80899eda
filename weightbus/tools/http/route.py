"""A route that answers a bad request in the form of the routes that it stands among."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message

from weightbus.errors import HubError, WeightbusError
from weightbus.storage.opened import short
from weightbus.tools.http.guard import Access, Intake, Refusal


def _answer(success: bool, message: str, status: int | None = None) -> JSONResponse:
    # A request can spell half a surrogate pair, which no answer could repeat.
    text = message.encode("utf-8", "replace").decode()
    return JSONResponse({"success": success, "message": text}, status or (200 if success else 400))


class _Route(APIRoute):
    """Bounds who asks and what, and answers what is refused in the routes' own form."""

    access: Access
    intake: Intake

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            taken: list[bytes] = []
            entered = False
            try:
                self.access.check(request.headers)
                if request.method != "GET":
                    self.intake.enter()
                    entered = True
                    body = await self.intake.read(request, taken)
                    request = Request(request.scope, _replay(body))
                return await handle(request)
            except Refusal as refusal:
                return _answer(False, refusal.message, refusal.status)
            except RequestValidationError as error:
                return _answer(False, "; ".join(map(_validation, error.errors()[:5])))
            except HTTPException as error:
                return _answer(False, str(error.detail), error.status_code)
            except HubError as error:
                return _answer(False, str(error), 503)
            except (WeightbusError, ValueError) as error:
                return _answer(False, str(error))
            finally:
                if entered:
                    self.intake.leave(sum(map(len, taken)))

        return bounded


def _replay(body: bytes) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _validation(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "body")
    return short(f"{where or 'body'}: {error['msg']}")
