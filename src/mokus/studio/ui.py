"""`mokus ui`: the studio in a browser on this machine. All of it comes from here: no fonts, scripts or figures from elsewhere.

Pages are made by the server from templates and work as plain forms; one small script keeps what runs up to date. Work is done
by the worker's process, so a page never waits for a model. Nothing but this machine's own browser is answered: the socket is
bound to 127.0.0.1, another name for it is refused (DNS rebinding), and so is a form that another site sends.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mokus.console import note
from mokus.errors import MokusError
from mokus.pipeline import MINIATURE, defaults_of
from mokus.studio import bench_tab, draw_tab, jobs_tab, know_tab, learn_tab, start_tab, words_tab
from mokus.studio.home import Home
from mokus.studio.page import FAULTS, Studio, said
from mokus.studio.worker import Worker

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # what a browser may call it
TABS = (start_tab, learn_tab, know_tab, draw_tab, words_tab, bench_tab, jobs_tab)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def build(studio: Studio) -> Starlette:
    """The web application."""

    def picture(request: Request) -> Response:
        path = studio.home.inside(request.path_params["path"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, headers={"Cache-Control": "no-cache"})

    def wrong(request: Request, error: Exception) -> Response:
        return studio.page("error.html", error=said(error))

    def missing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        what = "There is no such page." if status == 404 else f"That cannot be done here (HTTP {status})."
        response = studio.page("error.html", error=what)
        response.status_code = status
        return response

    return Starlette(
        routes=[
            *(route for tab in TABS for route in tab.routes(studio)),
            Route("/files/{path:path}", picture),
            Mount("/static", StaticFiles(directory=str(files("mokus.studio").joinpath("static")))),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES), www_redirect=False),
            Middleware(OwnPagesAlone),
        ],
        exception_handlers={HTTPException: missing, **dict.fromkeys(FAULTS, wrong)},
    )


class OwnPagesAlone:
    """Refuses what another site's page sends, and forbids our own pages to load anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin not in (None, f"http://{headers.get('host')}"):
            await PlainTextResponse("this form was sent by another site", 403)(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                guarded = MutableHeaders(scope=message)
                guarded.setdefault("Content-Security-Policy", POLICY)  # a benchmark's report has its own
                guarded["X-Content-Type-Options"] = "nosniff"
                guarded["Referrer-Policy"] = "same-origin"
            await send(message)

        await self.app(scope, receive, send_guarded)


def launch(
    home: Path, port: int, model: str | None, device: str | None, reports: Sequence[Path], browser: bool,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM, which stop what runs as its button does.

    `port` 0 takes a free one; a model that cannot be loaded is told of on stderr and on every page.
    Raises `MokusError` for a port or a home that is taken.
    """
    defaults = defaults_of(model)
    bound = _bind(port)
    address = f"http://{ADDRESS}:{bound.getsockname()[1]}/"
    with bound, _terminated_as_interrupted(), Worker(home, model, device) as worker:
        studio = Studio(Home(home), worker, model or MINIATURE, defaults, reports)
        app, over = build(studio), threading.Event()

        def loaded(about: Future[Any]) -> None:
            if (error := about.exception()) and not over.is_set():  # at the end the worker is stopped, loading or not
                studio.trouble = str(error)
                note(f"the model could not be loaded: {error}")

        worker.call("describe").add_done_callback(loaded)  # it is loaded while one looks around

        @contextlib.asynccontextmanager
        async def ready(app: Starlette) -> AsyncIterator[None]:
            say(f"MoKus studio: {address}  (Ctrl-C ends it; everything is kept in {home})")
            if browser:
                webbrowser.open(address)
            yield

        app.router.lifespan_context = ready
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        with contextlib.suppress(KeyboardInterrupt):  # how uvicorn ends, for it raises the signal again
            uvicorn.Server(config).run(sockets=[bound])
        over.set()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends what runs as Ctrl-C does, so that the worker is closed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bind(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((ADDRESS, port))
    except OSError as error:
        bound.close()
        raise MokusError(
            f"the port {port} cannot be had ({error.strerror}); name another with --port, or 0 for any that is free."
        ) from error
    return bound
