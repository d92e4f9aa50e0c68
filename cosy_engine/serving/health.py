"""Routes for whoever watches the server: a load balancer, Docker, Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cosy_engine.engine import Engine


def health_routes(engine: Engine, *, metrics: bool = False) -> list[Route]:
    """`/healthz`, and `/metrics` when asked for. Both answer without a login and tell nothing about what is spoken.

    `/healthz` is 200 while the engine takes requests, with how many it works on and how many wait, and 503 after.
    """

    async def healthz(_: Request) -> Response:
        status = {"status": "stopped" if engine.closed else "ok"}
        status |= {"active": engine.queue.active, "waiting": engine.queue.waiting}
        return JSONResponse(status, 503 if engine.closed else 200, {"Cache-Control": "no-store"})

    async def numbers(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    routes = [Route("/healthz", healthz)]
    if metrics:
        routes.append(Route("/metrics", numbers))
    return routes
