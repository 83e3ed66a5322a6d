"""`mokus serve`: OpenAI's images API over a worker. One process speaks HTTP, the other one draws.

    POST /v1/images/generations   {"model", "prompt", "n", "size", "response_format", "seed"}
    POST /v1/prompt_embeds        what the image transformer is told, for another engine to draw from
    GET  /v1/models /v1/images/NAME.png /healthz /metrics

Whatever a visitor sends is checked here before the worker hears of it; names of packs are looked up in one folder.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from mokus.errors import MokusError
from mokus.knowledge import check_encodable
from mokus.settings import AT_ONCE
from mokus.sizes import Size
from mokus.studio.batches import Batches, Refused
from mokus.studio.openai import ApiError, EmbedsRequest, ImagesRequest, Models, size_of
from mokus.studio.worker import Worker, WorkerDied

BODY_BYTES = 64 << 10  # of a request
BODY_SECONDS = 30.0  # for a request to arrive
KEPT_IMAGES = 256  # that are fetched by their URL; the oldest goes first
EMBEDDING = 16  # encodings that may be waited for at a time
LOOK_SECONDS = 0.5  # between two looks whether a visitor is still there
LOCAL = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/healthz",)  # without a token; images have unguessable names
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

log = logging.getLogger("mokus.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for, and how much is held for all of them."""

    prompt: int = 1000  # characters
    n: int = 8  # images of one request
    size: int | None = None  # pixels; None is the model's own
    queue: int = 64  # images that wait
    batch: int = AT_ONCE  # images drawn at a time
    packs: int = 8  # in memory


class _Metrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter("mokus_requests", "Requests by path and status.", ["path", "status"], registry=here)
        self.seconds = Histogram(
            "mokus_request_seconds", "Seconds to answer.", ["path"], buckets=SECONDS, registry=here
        )
        self.images = Counter("mokus_images", "Images drawn.", registry=here)
        self.batch = Histogram("mokus_batch_images", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=here)
        self.drawing = Histogram("mokus_batch_seconds", "Seconds to draw a batch.", buckets=SECONDS, registry=here)
        self.waiting = Gauge("mokus_waiting_images", "Images that wait to be drawn.", registry=here)
        self.deaths = Counter("mokus_worker_deaths", "Times that the worker died over a request.", registry=here)

    def drawn(self, images: int, seconds: float) -> None:
        self.images.inc(images)
        self.batch.observe(images)
        self.drawing.observe(seconds)


class Server:
    """The application, and what it holds."""

    def __init__(
        self, worker: Worker, model: dict[str, Any], packs: Path | None, images: Path, *, token: str | None = None,
        limits: Limits = Limits(), hosts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`model` as the worker describes it; images that are fetched by URL are kept in the folder `images`.

        `hosts`: by which visitors may call this machine besides `LOCAL` where there is no token.

        Raises `MokusError` if there is no folder `packs`, or the limits leave out what the model draws without being asked.
        """
        if limits.size is not None and limits.size < model["size"]:
            raise MokusError(f"--most-size is {limits.size}, expected at least the model's own size, {model['size']}.")
        self.worker, self.model, self.images, self.limits = worker, model, images, limits
        self.models = Models.of(model, packs)
        self.metrics = _Metrics()
        self.batches = Batches(
            worker, batch=limits.batch, queue=limits.queue, packs=limits.packs, drawn=self.metrics.drawn
        )
        self.metrics.waiting.set_function(lambda: self.batches.waiting)
        self.kept: list[str] = []
        self.embedding = 0
        self.app = self._app(token, [*LOCAL, *(f"[{host}]" if ":" in host else host for host in hosts)])

    def runner(self) -> uvicorn.Server:
        """What runs the application: `run(sockets=[...])`. Told to stop, it finishes what is being drawn and refuses the rest."""
        close = self.batches.close

        class Graceful(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                close()
                await super().shutdown(sockets)

        return Graceful(uvicorn.Config(self.app, log_level="warning", access_log=False))

    def _app(self, token: str | None, hosts: list[str]) -> FastAPI:
        app = FastAPI(title="MoKus", lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(_Guard, token=token, hosts=hosts, metrics=self.metrics)
        app.add_exception_handler(ApiError, _told)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _plain)
        app.add_exception_handler(Exception, _ours)
        app.post("/v1/images/generations")(self.generations)
        app.post("/v1/prompt_embeds")(self.prompt_embeds)
        app.get("/v1/models")(self.list_models)
        app.get("/v1/images/{name}.png")(self.image)
        app.get("/healthz")(self.health)
        app.get("/metrics")(self.tell_metrics)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(self.batches.run())
        task.add_done_callback(_ended)
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    # --- the endpoints ---------------------------------------------------------

    async def generations(self, asked: ImagesRequest, request: Request) -> dict[str, Any]:
        """OpenAI's images: drawn now, as base64 or as addresses of `image`."""
        pack = self.models.find(asked.model)
        self._check_prompt(asked.prompt)
        n, most = asked.n or 1, min(self.limits.n, self.limits.queue)
        if n > most:
            raise ApiError(400, f"n is {n}, expected at most {most}; ask again for more.", param="n")
        usual = self.model["size"]
        size = size_of(asked.size, usual, self.limits.size or usual, self.model["size_multiple"])
        first = secrets.randbelow(1 << 32) if asked.seed is None else asked.seed
        seeds = range(first, first + n)
        images = await self._drawn(pack, asked.prompt, seeds, size, request)
        url = asked.response_format == "url"
        return {
            "created": int(time.time()),
            "data": [
                {**self._sent(image, request, url), "seed": seed} for image, seed in zip(images, seeds, strict=True)
            ],
        }

    async def prompt_embeds(self, asked: EmbedsRequest) -> Response:
        """A prompt as it is encoded with a pack, for engines that draw by themselves."""
        pack = self.models.find(asked.model)
        self._check_prompt(asked.prompt)
        self._check_prompt(asked.negative_prompt or " ", "negative_prompt")
        if self.embedding >= EMBEDDING:
            raise ApiError(429, f"{EMBEDDING} encodings are waited for already; try again.", retry=1)
        self.embedding += 1
        try:
            call = self.worker.call(
                "embed", pack=pack, prompt=asked.prompt, negative=asked.negative_prompt, packs=self.limits.packs
            )
            data: bytes = await asyncio.wrap_future(call)
        except MokusError as error:
            raise self._error(error) from error
        finally:
            self.embedding -= 1
        if asked.response_format == "safetensors":
            return Response(data, media_type="application/octet-stream")
        return JSONResponse({
            "object": "prompt_embeds", "model": asked.model or self.models.base,
            "b64_json": base64.b64encode(data).decode(),
        })  # fmt: skip

    async def list_models(self) -> dict[str, Any]:
        """The base model and every pack."""
        return {"object": "list", "data": await asyncio.to_thread(self.models.listed)}

    async def image(self, name: str) -> Response:
        """One that was drawn, while it is kept."""
        if name not in self.kept:  # so it is no path either
            raise ApiError(404, "there is no such image, or it is gone; draw it again.")
        return Response((self.images / f"{name}.png").read_bytes(), media_type="image/png")

    async def health(self) -> dict[str, Any]:
        """Whether images are drawn, and how many wait."""
        if self.batches.closed:
            raise ApiError(503, "the server is closing.")
        return {
            "status": "ok",
            "model": self.models.base,
            "waiting": self.batches.waiting,
            "drawing": self.batches.drawing,
        }

    async def tell_metrics(self) -> Response:
        """In Prometheus's text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # --- inside ---------------------------------------------------------

    def _check_prompt(self, prompt: str, name: str = "prompt") -> None:
        try:
            check_encodable(prompt, name.replace("_", " "))
        except MokusError as error:
            raise ApiError(400, str(error).encode(errors="backslashreplace").decode(), param=name) from error
        if len(prompt) > self.limits.prompt:
            raise ApiError(
                400, f"the {name} has {len(prompt)} characters, expected at most {self.limits.prompt}; shorten it.",
                param=name,
            )  # fmt: skip

    async def _drawn(
        self, pack: str | None, prompt: str, seeds: range, size: Size, request: Request
    ) -> list[bytes]:  # fmt: skip
        """The images, unless whoever asked goes away meanwhile: what has not begun is then left out."""
        try:
            futures = self.batches.ask(pack, prompt, seeds, size)
        except Refused as error:
            raise self._error(error) from error
        try:
            while (await asyncio.wait(futures, timeout=LOOK_SECONDS))[1]:
                if await request.is_disconnected():
                    raise ApiError(499, "nobody waits for it any more.")
            return [future.result() for future in futures]
        except (MokusError, Refused) as error:
            raise self._error(error) from error
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # told once is enough

    def _error(self, error: MokusError | Refused) -> ApiError:
        if isinstance(error, Refused):
            return ApiError(503 if error.closing else 429, str(error), code="overloaded", retry=error.seconds)
        if isinstance(error, WorkerDied):
            self.metrics.deaths.inc()
            log.error("%s", error)
            return ApiError(503, "the image could not be drawn, for the worker died; try again.", retry=10)
        return ApiError(400, self.models.plain(str(error)), param="prompt" if "prompt" in str(error) else None)

    def _sent(self, image: bytes, request: Request, url: bool) -> dict[str, str]:
        if not url:
            return {"b64_json": base64.b64encode(image).decode()}
        name = secrets.token_hex(16)
        (self.images / f"{name}.png").write_bytes(image)
        self.kept.append(name)
        while len(self.kept) > KEPT_IMAGES:
            (self.images / f"{self.kept.pop(0)}.png").unlink(missing_ok=True)
        return {"url": f"{request.base_url}v1/images/{name}.png"}


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("the server draws no more", exc_info=error)


# --- errors ---------------------------------------------------------


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _plain(request: Request, error: Exception) -> Response:
    """Of the framework: no such path or method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, str(error.detail))
    return JSONResponse(told.body, error.status_code, dict(error.headers or {}))


async def _ours(request: Request, error: Exception) -> Response:
    """A fault of this program, which the log tells of."""
    return await _told(request, ApiError(500, "the server made a mistake, which is in its log."))


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is not as it must be: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    broken = first["type"] == "json_invalid"
    where = "" if broken else ".".join(str(part) for part in first["loc"][1:])[:100]
    if broken:
        said = f"the body is no JSON ({first['ctx']['error']})."
    elif where:
        said = f"{where}: {first['msg']}."
    elif "json" in request.headers.get("content-type", "").lower():
        said = "the body is something else than this takes, expected a JSON object."
    else:  # the framework has not read it as JSON
        said = "the body is not marked as JSON; send it with the header Content-Type: application/json."
    return await _told(request, ApiError(400, said, param=where or None))


# --- before anything else ---------------------------------------------------------


class _Guard:
    """Who may come in, how much may be brought along, and a count of all of it."""

    def __init__(self, app: Any, token: str | None, hosts: list[str], metrics: _Metrics) -> None:
        self.app, self.token, self.hosts, self.metrics = app, token, hosts, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, await _whole(scope, receive), watched)
        except ApiError as error:  # before the application has begun to answer
            headers = {**error.headers, "Connection": "close"}  # what is left of the body is not read
            await JSONResponse(error.body, error.status, headers)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # never a visitor's own words
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _admit(self, scope: Message) -> None:
        headers = {name: value for name, value in scope["headers"]}
        if self.token is None:  # on this machine alone; a web page elsewhere may have made its name point here
            host = headers.get(b"host", b"").decode("latin-1")
            if host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
                raise ApiError(403, "without a token this server answers to 127.0.0.1, localhost and its --host alone.")
            return
        path = scope["path"]
        if path in OPEN or (path.startswith("/v1/images/") and path.endswith(".png") and scope["method"] == "GET"):
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise ApiError(401, "expected the header 'Authorization: Bearer TOKEN'.", code="invalid_api_key")


async def _whole(scope: Message, receive: Receive) -> Receive:
    """The body, read whole before it is looked at. Raises `ApiError` as soon as it is too long, or too slow."""
    too_long = ApiError(413, f"the body is longer than {BODY_BYTES >> 10} KiB; send a shorter one.")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length[:20]) > BODY_BYTES:
        raise too_long
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    break
                body, more = body + message.get("body", b""), message.get("more_body", False)
                if len(body) > BODY_BYTES:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} s to arrive.") from None
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
