"""The yardstick of the HTTP benchmarks: a route that only reads the body, served as tallystick is."""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def read(request: Request) -> Response:
    """Read the body and say how long it was."""
    return JSONResponse({"bytes": len(await request.body())}, status_code=202)


def main() -> None:
    """Serve on the port of the first argument."""
    app = Starlette(routes=[Route("/v1/usage", read, methods=["POST"])])
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", log_config=None, access_log=False)


if __name__ == "__main__":
    main()
