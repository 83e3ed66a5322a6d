"""Whatever comes over HTTP to `mokus serve`: an answer in OpenAI's form, never a fault of the server's own."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ..conftest import PackFactory
from ..test_concept_pack import say
from .conftest import case
from .test_fuzz import bytes_near, deep, mutated, texts

serve = pytest.importorskip("mokus.studio.serve", reason="`mokus serve` is not there, or its extra is not installed")

ASKED = {
    "prompt": "my toy in the snow",
    "model": "a.pack",
    "n": 2,
    "size": "32x32",
    "response_format": "b64_json",
    "seed": 1,
}
PATHS = ["/v1/images/generations", "/v1/prompt_embeds", "/v1/models", "/healthz", "/metrics", "/v1/images/x.png", "/",
         "/v1/images/../../etc/passwd.png", "/v1/images/%2e%2e%2fx.png", "//evil", "/v1/images/generations/",
         "/\u202e"]  # fmt: skip


class Worker:
    """Draws at once, and fails for some prompts as the real one does."""

    def call(self, what: str, **given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        if what == "embed":
            done.set_result(b"embeds")
        else:
            done.set_result(["it cannot be drawn." if "!" in prompt else b"png" for _, prompt, _ in given["wishes"]])
        return done


@pytest.fixture(scope="module")
def server(pico_pack: PackFactory, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Over a folder of two packs, one of which says odd things."""
    folder = tmp_path_factory.mktemp("packs")
    pack = pico_pack(folder / "a.pack")
    odd = pico_pack(folder / "odd.pack")
    say(odd.path, lambda text: text["knowledge"][0].update(text="\ud800 \x1b[2J"))
    about = {"id": "miniature", "fingerprint": pack.fingerprint, "size": 32, "size_multiple": 16}
    return serve.Server(Worker(), about, folder, tmp_path_factory.mktemp("images"))


def ask(
    server: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], parts: list[bytes]
) -> tuple[int, bytes]:
    """Status and body; anything the application raises is raised here."""
    case("fuzz of HTTP")
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def talk() -> None:
        drawing = asyncio.create_task(server.batches.run())
        raw = path.encode("utf-8", "replace")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": raw, "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        try:
            await asyncio.wait_for(server.app(scope, receive, send), 20)
        finally:
            drawing.cancel()

    server.batches._some, server.batches.closed = asyncio.Event(), False  # of this loop; the last one closed it
    asyncio.run(talk())
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return sent[0]["status"], body


HERE = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")]


def answered(status: int, body: bytes) -> None:
    assert status < 500, (status, body)
    if status >= 400 and body:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert len(body) < 4000


@given(st.one_of(
    mutated(ASKED).map(lambda value: json.dumps(value).encode()), bytes_near(json.dumps(ASKED).encode()), st.binary(max_size=40)
), st.sampled_from(PATHS[:2]))  # fmt: skip
@example(b'{"prompt": "\\ud800"}', PATHS[0])
@example(b'{"prompt": "x", "\\ud800": 1}', PATHS[0])
@example(b'{"prompt": "x", "model": "\\ud800"}', PATHS[0])
@example(b'{"prompt": "x", "size": "\\ud800"}', PATHS[0])
@example(b'{"prompt": "x", "size": "\\u0663\\u0662x\\u0663\\u0662"}', PATHS[0])
@example(b'{"prompt": "x", "model": "../a.pack"}', PATHS[0])
@example(b'{"prompt": "x", "model": ".."}', PATHS[1])
@example(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", PATHS[0])
@example(b'{"prompt": "x", "seed": 9223372036854775807, "n": 8}', PATHS[0])
@example(b'{"prompt": "x", "n": 1e999}', PATHS[0])
@example(b'{"prompt": "x", "n": NaN}', PATHS[0])
@example(b'{"prompt": "!"}', PATHS[0])
@example(deep(20_000).encode(), PATHS[0])
@example(b'{"prompt": ' + deep(900).encode() + b"}", PATHS[0])
@example(b"", PATHS[0])
@example(b"\xff\xfe", PATHS[1])
def test_bodies(server: Any, body: bytes, path: str) -> None:
    answered(*ask(server, "POST", path, HERE, [body]))


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "\x00", "get"]),
    st.one_of(st.sampled_from(PATHS), texts.map(lambda text: "/" + text)),
)
@example("GET", "/v1/models")
def test_paths_and_methods(server: Any, method: str, path: str) -> None:
    status, body = ask(server, method, path, HERE, [b""])
    assert status < 500 and b"root:" not in body and b"Traceback" not in body


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"host", b"content-length", b"content-type", b"authorization", b"transfer-encoding", b"x"]
            ),
            st.one_of(
                st.binary(max_size=30), st.sampled_from([b"-1", b"1e9", b"9" * 5000, b"application/json", b"\xb2"])
            ),
        ),
        max_size=4,
    ),
    st.lists(st.binary(max_size=20), min_size=1, max_size=3),
)
@example([(b"host", b"localhost"), (b"content-length", b"9" * 5000)], [b"{}"])
@example([(b"host", b"localhost"), (b"content-type", b"application/json; charset=\xff")], [b"{}"])
@example([(b"host", b"localhost.evil.example")], [b"{}"])
def test_headers(server: Any, headers: list[tuple[bytes, bytes]], parts: list[bytes]) -> None:
    answered(*ask(server, "POST", PATHS[0], headers, parts))


def test_bodies_without_an_end(server: Any) -> None:
    assert ask(server, "POST", PATHS[0], HERE, [b" " * 10_000] * 100)[0] == 413


def test_no_name_leads_out_of_the_folder(server: Any, tmp_path: Path) -> None:
    for name in ("..", ".", "../x", "/etc", "a.pack/..", "a.pack/", "a.pack\x00", "a.pack\n", "", "%2e%2e", "C:\\"):
        status, body = ask(server, "POST", PATHS[0], HERE, [json.dumps({"prompt": "x", "model": name}).encode()])
        assert status == 404 and str(server.models.folder).encode() not in body, name
