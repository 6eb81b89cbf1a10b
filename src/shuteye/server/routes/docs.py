"""GET /docs: every route on one page, for people.

Knows nothing of the routes: the OpenAPI document does.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request, Response

from shuteye.server.docs_page import CONTENT_SECURITY_POLICY, render

router = APIRouter()


@router.get("/docs", include_in_schema=False, response_model=None)
async def docs(request: Request) -> Response:
    """Every route on one page, which works without a network; GET `/openapi.json` is the same for programs."""
    app: FastAPI = request.app
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return Response(render(app.openapi()), media_type="text/html", headers=headers)
