"""`mokus serve`: with a worker that is a puppet, for all that is decided before one draws; and as a whole, over a real port."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from diffusers import QwenImagePipeline
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load as tensors_of
from starlette.testclient import TestClient
from typer.testing import CliRunner

import mokus
from mokus.cli import app
from mokus.errors import MokusError
from mokus.generation import png_bytes
from mokus.packs import concept_pack
from mokus.pipeline import Model
from mokus.studio import openai, serve_cli
from mokus.studio.serve import BODY_BYTES, Limits, Server
from mokus.studio.shelf import Shelf
from mokus.studio.worker import WorkerDied
from tests.conftest import SIZE, PackFactory

TOKEN = "a-secret-of-the-tests"
IMAGES = "/v1/images/generations"
HEAD = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ABOUT = {
    "id": "/models/pico", "fingerprint": "f" * 64, "device": "cpu", "size": 32, "size_multiple": 16, "steps": 2,
    "true_cfg_scale": 4.0, "negative_prompt": " ",
}  # fmt: skip


class Puppet:
    """A worker that does what the test says when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], Future[Any]]] = []
        self.at_once = True

    def call(self, name: str, **arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((name, arguments, future))
        if self.at_once:
            self.answer(len(self.calls) - 1)
        return future

    def answer(self, i: int, fault: MokusError | None = None) -> None:
        name, arguments, future = self.calls[i]
        if fault:
            future.set_exception(fault)
        else:
            wishes = arguments.get("wishes", [])
            future.set_result([f"{p}|{t}|{s}".encode() for p, t, s in wishes] if name == "draw" else b"tensors")

    def until(self, n: int) -> None:
        end = time.monotonic() + 30
        while len(self.calls) < n:
            assert time.monotonic() < end, "the worker was not called"
            time.sleep(0.005)


class Client:
    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.token = port, token

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Content-Type": "application/json"} if body is not None else {}
        head |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection.request(method, path, sent, {**head, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def draw(self, **body: Any) -> tuple[int, dict[str, Any]]:
        status, _, data = self.ask("POST", IMAGES, body)
        return status, json.loads(data)

    def images(self, **body: Any) -> list[bytes]:
        status, told = self.draw(**body)
        assert status == 200, told
        return [base64.b64decode(each["b64_json"]) for each in told["data"]]


class Running:
    """The application of a puppet behind a real port."""

    def __init__(self, folder: Path, token: str | None = None, limits: Limits | None = None) -> None:
        packs = folder / "packs"
        for name, fingerprint in (("toy", "f" * 64), ("stranger", "0" * 64)):
            (packs / name).mkdir(parents=True)
            says = {"fingerprint": fingerprint, "anchor": "sks toy", "knowledge": [{"text": "my toy"}], "files": {}}
            (packs / name / "mokus.json").write_text(json.dumps(says))
        (packs / "broken").mkdir()
        (packs / "broken" / "mokus.json").write_text("[" * 100_000)
        (folder / "images").mkdir()
        self.packs, self.worker = packs, Puppet()
        self.server = Server(
            self.worker, ABOUT, packs, folder / "images", token=token,  # type: ignore[arg-type]
            limits=limits or Limits(prompt=40, n=3, size=64, queue=6, batch=4, packs=2),
        )  # fmt: skip
        listening = socket.create_server(("127.0.0.1", 0))
        self.client = Client(listening.getsockname()[1], token)
        self.uvicorn = self.server.runner()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.uvicorn.serve([listening])), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


def error_of(answer: tuple[int, dict[str, Any]]) -> tuple[int, str | None]:
    status, told = answer
    assert told["error"].keys() == {"message", "type", "param", "code"} and told["error"]["message"]
    return status, told["error"]["code"] or told["error"]["param"]


def test_what_is_asked_reaches_the_worker_and_comes_back(running: Running) -> None:
    ask = running.client
    toy = str(running.packs / "toy")
    assert ask.images(model="toy", prompt="a toy", n=2, seed=7) == [f"{toy}|a toy|{s}".encode() for s in (7, 8)]
    assert ask.images(prompt="a ball", seed=1, size="64x64", response_format=None, n=None) == [b"None|a ball|1"]
    assert ask.images(prompt="a ball", seed=1, size="128x32") == [b"None|a ball|1"]  # no more pixels than 64x64 has
    assert running.worker.calls.pop()[1]["size"] == (128, 32)
    assert running.worker.calls[-1][1]["size"] == 64 and running.worker.calls[0][1]["size"] == 32
    status, told = ask.draw(prompt="a", response_format="url", seed=3, model="pico")
    url = told["data"][0]["url"]
    assert status == 200 and told["data"][0]["seed"] == 3
    assert ask.ask("GET", url[url.index("/v1/") :])[2] == b"None|a|3"
    one, other = (ask.draw(prompt="a")[1]["data"][0]["seed"] for _ in range(2))
    assert one != other  # without a seed every image is another one, and says which
    listed = json.loads(ask.ask("GET", "/v1/models")[2])["data"]
    assert [row["id"] for row in listed] == ["pico", "toy"] and listed[1]["knowledge"] == ["my toy"]


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        ({"prompt": "x" * 41}, 400, "prompt"), ({"prompt": "x", "n": 4}, 400, "n"), ({"prompt": "x", "n": 0}, 400, "n"),
        ({"prompt": "x", "n": "1"}, 400, "n"), ({"prompt": "x", "n": True}, 400, "n"), ({}, 400, "prompt"),
        ({"prompt": ["x"]}, 400, "prompt"), ({"prompt": None}, 400, "prompt"), ({"prompt": "x", "n": 10**400}, 400, "n"),
        ({"prompt": "x", "size": "128x128"}, 400, "size"), ({"prompt": "x", "size": "80x64"}, 400, "size"),
        ({"prompt": "x", "size": "24x24"}, 400, "size"), ({"prompt": "x", "size": "32x24"}, 400, "size"),
        ({"prompt": "x", "size": "64"}, 400, "size"), ({"prompt": "x", "size": "0x0"}, 400, "size"),
        ({"prompt": "x", "size": "٣٢x٣٢"}, 400, "size"), ({"prompt": "x", "size": 32}, 400, "size"),
        ({"prompt": "x", "seed": -1}, 400, "seed"), ({"prompt": "x", "seed": 2**63}, 400, "seed"),
        ({"prompt": "x", "seed": 1.5}, 400, "seed"), ({"prompt": "x", "response_format": "exe"}, 400, "response_format"),
        ({"prompt": "x", "steps": 10**9}, 400, "steps"), ({"prompt": "\ud800"}, 400, "prompt"),
        *(({"prompt": "x", "model": name}, 404, "model_not_found") for name in (
            "nothing", "stranger", "broken", "../packs/toy", "/etc/passwd", "toy/", "toy/.", "..", ".", "", "toy\0", "TOY/../toy",
            "..\\toy", "%2e%2e/toy", "~", "x" * 10_000,
        )),
        ([], 400, None), ("x", 400, None), (None, 400, None), (7, 400, None),
        (b"{", 400, None), (b"\xff\xfe", 400, None), (b"", 400, None), (b"[" * 50_000, 400, None),
        (b'{"prompt": NaN}', 400, None),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_the_worker_hears_of_it(
    shared: Running, body: Any, status: int, what: str | None
) -> None:
    got, _, data = shared.client.ask("POST", IMAGES, body if isinstance(body, bytes) else json.dumps(body).encode())
    code, about = error_of((got, json.loads(data)))
    assert code == status and (what is None or about == what)
    assert not shared.worker.calls


def test_packs_that_are_not_served_are_told_with_why(tmp_path: Path) -> None:
    says = {"fingerprint": "f" * 64, "anchor": "sks toy", "knowledge": [], "files": {}}
    reasons = {
        "toy": None, "with space": "rename", "pico": "base model has this name", "пример.pack": "rename",
        "x" * 101: "rename", "stranger": "another base model", "broken": "cannot be read", ".toy.1.tmp": None,
    }  # fmt: skip
    for name in reasons:
        (tmp_path / name).mkdir()
        about = {**says, "fingerprint": "0"} if name == "stranger" else {} if name == "broken" else says
        (tmp_path / name / "mokus.json").write_text(json.dumps(about))
    (tmp_path / "no pack").mkdir()
    models = openai.Models.of(ABOUT, tmp_path)
    told = models.left_out()
    assert told.keys() == {name for name, why in reasons.items() if why}
    assert all(str(reasons[name]) in why for name, why in told.items())
    assert [row["id"] for row in models.listed()] == ["pico", "toy"]
    assert openai.Models.of(ABOUT, None).left_out() == {}


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b'{"prompt": "x"}', "text/plain", "with the header Content-Type: application/json"),
        (b'{"prompt": "x"}', "application/x-www-form-urlencoded", "with the header Content-Type: application/json"),
        (b'{"prompt": "x"}', "", "with the header Content-Type: application/json"),
        *((body, "application/json", "expected a JSON object") for body in (b"[]", b"null", b"7", b"")),
    ],
)
def test_a_body_that_is_no_object_is_told_what_to_do(shared: Running, body: bytes, kind: str, said: str) -> None:
    status, _, data = shared.client.ask("POST", IMAGES, body, {"Content-Type": kind})
    assert status == 400 and said in json.loads(data)["error"]["message"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("shared"))
    yield made
    made.close()


def test_other_paths_and_methods_have_errors_of_the_same_shape(shared: Running) -> None:
    for method, path, status in (
        ("GET", IMAGES, 405), ("POST", "/v1/chat/completions", 404), ("GET", "/v1/images/../../x.png", 404),
        ("GET", "/v1/images/%2e%2e%2fx.png", 404), ("GET", "/docs", 404),
    ):  # fmt: skip
        got, _, data = shared.client.ask(method, path)
        assert error_of((got, json.loads(data)))[0] == status
    got, _, _ = shared.client.ask("POST", IMAGES, b'{"prompt": "x"}', {"Content-Type": "text/plain"})
    assert got == 400  # what a web page elsewhere could send without asking
    for host in ("evil.example:80", "127.0.0.2:80", "", "127.0.0.1.evil.example"):
        assert shared.client.ask("GET", "/healthz", None, {"Host": host})[0] == 403


def answer_to(port: int, sent: bytes) -> bytes:
    """What comes back for bytes after which nothing more is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        return connection.recv(65536)


def test_a_body_of_a_hundred_megabytes_is_refused_before_it_is_sent(shared: Running) -> None:
    declared = answer_to(shared.client.port, f"{HEAD}Content-Length: {100 << 20}\r\n\r\n".encode())
    assert declared.startswith(b"HTTP/1.1 413")
    part = b"%x\r\n%s\r\n" % (BODY_BYTES + 1, b"x" * (BODY_BYTES + 1))
    undeclared = answer_to(shared.client.port, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + part)
    assert undeclared.startswith(b"HTTP/1.1 413")


def test_without_the_token_nothing_but_health(tmp_path: Path) -> None:
    running = Running(tmp_path, TOKEN)
    try:
        assert running.client.draw(prompt="x")[0] == 200
        for token in (None, "", "wrong", TOKEN + "x", "tökén"):
            stranger = Client(running.client.port)
            head = {} if token is None else {"Authorization": f"Bearer {token}".encode().decode("latin-1")}
            for method, path in (
                ("POST", IMAGES),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("POST", "/v1/prompt_embeds"),
            ):
                status, headers, data = stranger.ask(method, path, {"prompt": "x"} if method == "POST" else None, head)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert error_of((status, json.loads(data)))[1] == "invalid_api_key"
            assert stranger.ask("GET", "/healthz", None, head)[0] == 200
    finally:
        running.close()


def test_a_server_that_others_can_reach_needs_a_token() -> None:
    for arguments in (["--host", "0.0.0.0"], ["--host", "::"], ["--host", "0.0.0.0", "--token", "short"]):
        result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments], env={"MOKUS_TOKEN": ""})
        assert result.exit_code == 2 and "token" in result.stderr, result.stderr


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_a_server_of_this_machine_alone_answers_by_the_name_it_was_given(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, worker = [], Puppet()

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        at = serve_cli._written(sockets[0].getsockname())
        client = TestClient(server.config.app)  # type: ignore[arg-type]
        got.extend(client.get("/healthz", headers={"Host": each}).status_code for each in (at, "evil.example"))

    monkeypatch.setattr("mokus.studio.worker.Worker", lambda *_: contextlib.nullcontext(worker))
    monkeypatch.setattr(worker, "answer", lambda i: worker.calls[i][2].set_result(ABOUT))
    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        socket.create_server((host, 0), family=socket.getaddrinfo(host, None)[0][0]).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--host", host], env={"MOKUS_TOKEN": None})
    assert (result.exit_code, got) == (0, [200, 403]), result.stderr


def test_a_folder_of_packs_that_is_missing_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("mokus.studio.worker.Worker", load)
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        result = CliRunner().invoke(app, ["serve", "--port", "0", "--packs", str(tmp_path / name)])
        assert (result.exit_code, "there is no folder" in result.stderr) == (2, True), result.exception


def test_what_waits_is_drawn_together_up_to_the_limits_and_no_more_may_wait(running: Running) -> None:
    worker, ask = running.worker, running.client
    worker.at_once = False
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask.images, prompt="first", seed=0)
        worker.until(1)
        others = []
        for i, (pack, size) in enumerate([("toy", "32x32"), ("pico", "64x64"), ("pico", "32x32")]):
            others.append(pool.submit(ask.images, model=pack, prompt=f"p{i}", size=size, seed=i, n=2))
            until(lambda i=i: running.server.batches.waiting == 2 * (i + 1))
        status, headers, data = ask.ask("POST", IMAGES, {"prompt": "one too many"})
        assert error_of((status, json.loads(data)))[0] == 429 and int(headers["retry-after"]) >= 1
        worker.answer(0)
        worker.until(2)
        packs = [(Path(pack).name if pack else None, prompt) for pack, prompt, _ in worker.calls[1][1]["wishes"]]
        assert packs == [("toy", "p0"), ("toy", "p0"), (None, "p2"), (None, "p2")]  # p1 has another size
        worker.answer(1)
        worker.until(3)
        assert [prompt for _, prompt, _ in worker.calls[2][1]["wishes"]] == ["p1", "p1"]
        worker.answer(2)
        assert first.result(30) == [b"None|first|0"]
        assert others[2].result(30) == [b"None|p2|2", b"None|p2|3"] and others[1].result(30)[0] == b"None|p1|1"


def until(true: Any) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_a_worker_that_dies_or_refuses(running: Running) -> None:
    worker, ask = running.worker, running.client
    worker.at_once = False
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask.ask, "POST", IMAGES, {"prompt": "x"})
        worker.until(1)
        worker.answer(0, WorkerDied("the worker died (signal 9)."))
        status, headers, data = asked.result(30)
        assert error_of((status, json.loads(data)))[0] == 503 and "retry-after" in headers
        asked = pool.submit(ask.ask, "POST", IMAGES, {"prompt": "x"})
        worker.until(2)
        worker.calls[1][2].set_result([f"{running.packs}/toy lacks something; get it."])
        status, _, data = asked.result(30)
        message = json.loads(data)["error"]["message"]
        assert status == 400 and message == "toy lacks something; get it."  # and not where it is
    worker.at_once = True
    assert ask.draw(prompt="x")[0] == 200


def test_a_fault_of_ours_leaves_nobody_waiting(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, **arguments: Any) -> Future[Any]:
        raise RuntimeError("a fault")

    monkeypatch.setattr(running.worker, "call", broken)
    for _ in range(2):  # what was drawn, and what comes later
        assert error_of(running.client.draw(prompt="x"))[0] == 503
    assert running.client.ask("GET", "/healthz")[0] == 503


def test_those_who_go_are_not_drawn_for(running: Running) -> None:
    worker, ask = running.worker, running.client
    worker.at_once = False
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask.images, prompt="first")
        worker.until(1)
        body = b'{"prompt": "gone", "n": 3}'
        gone = [socket.create_connection(("127.0.0.1", ask.port)) for _ in range(2)]
        for connection in gone:
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: running.server.batches.waiting == 6)  # as many as may
        for connection in gone:
            connection.close()
        time.sleep(1.2)  # more than the server takes to look
        last = pool.submit(ask.images, prompt="last", n=3)
        until(lambda: running.server.batches.waiting == 3)
        worker.answer(0)
        worker.until(2)
        assert [prompt for _, prompt, _ in worker.calls[1][1]["wishes"]] == ["last"] * 3
        worker.answer(1)
        assert first.result(30) and last.result(30)


def test_closing_finishes_what_is_drawn_and_refuses_what_waits(running: Running) -> None:
    worker, ask = running.worker, running.client
    worker.at_once = False
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(ask.ask, "POST", IMAGES, {"prompt": "x"})
        worker.until(1)
        waits = pool.submit(ask.ask, "POST", IMAGES, {"prompt": "y"})
        until(lambda: running.server.batches.waiting == 1)
        running.uvicorn.should_exit = True
        status, headers, data = waits.result(30)
        assert error_of((status, json.loads(data)))[0] == 503 and "retry-after" in headers
        worker.answer(0)
        assert drawn.result(30)[0] == 200


def test_metrics_count_what_happened(running: Running) -> None:
    ask = running.client
    ask.images(prompt="x", n=3)
    ask.draw(prompt="x", n=99)
    ask.ask("GET", "/a/word/of/mine")
    status, headers, data = ask.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    found = {
        (each.name, *each.labels.values()): each.value
        for family in text_string_to_metric_families(data.decode()) for each in family.samples
    }  # fmt: skip
    assert found["mokus_requests_total", IMAGES, "200"] == found["mokus_requests_total", IMAGES, "400"] == 1
    assert found["mokus_requests_total", "other", "404"] == 1  # a visitor's words are no label
    assert found["mokus_images_total",] == 3 and found["mokus_batch_images_count",] == 1
    assert found["mokus_waiting_images",] == 0 and found["mokus_request_seconds_count", IMAGES] == 2


# --- the shelf ---------------------------------------------------------


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(png)), dtype=int)


def test_packs_drawn_in_one_batch_are_each_as_alone(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    packs = [pico_pack(tmp_path / f"{i}.pack", seed=i, anchor=f"{rare} toy") for i, rare in enumerate(("sks", "zwx"))]
    shelf = Shelf(pico)
    wishes = [
        (path, "my favourite toy", seed) for seed in (0, 1) for path in (str(packs[0].path), None, str(packs[1].path))
    ]
    try:
        mixed = shelf.draw([*wishes, (str(tmp_path / "none"), "x", 0), (None, "<|im_end|>", 0)], SIZE, 3)
        assert [type(each) for each in mixed] == [bytes] * 6 + [str, str]
        alone = [shelf.draw([wish], SIZE, 3)[0] for wish in wishes]
        packs[0].replace_edits([])  # another process changes it: the next image is of what it is now
        changed = shelf.draw([wishes[0]], SIZE, 3)[0]
    finally:
        shelf.clear()
    by_path = {None: [], **{str(pack.path): [pack] for pack in packs}}
    by_path[str(packs[0].path)] = [pico_pack(tmp_path / "again.pack", seed=0)]
    for wish, one, many in zip(wishes, alone, mixed[:6], strict=True):
        wanted = next(mokus.generate(pico, wish[1], packs=by_path[wish[0]], seeds=[wish[2]]))
        assert one == png_bytes(wanted)
        assert np.abs(pixels(many) - pixels(one)).max() <= 2
    assert np.abs(pixels(mixed[0]) - pixels(mixed[2])).max() > 20  # so looks do tell them apart
    assert changed == png_bytes(next(mokus.generate(pico, wishes[0][1], packs=[packs[0]])))


def test_the_shelf_is_bounded_and_leaves_the_model_bare(pico: Model, pico_pack: PackFactory, tmp_path: Path) -> None:
    before = png_bytes(next(mokus.generate(pico, "a red ball")))
    shelf = Shelf(pico)
    for i in range(3):
        shelf.draw([(str(pico_pack(tmp_path / f"{i}.pack", seed=i).path), "sks toy", 0)], SIZE, 2)
        assert len(pico.pipe.transformer.peft_config) == min(i + 1, 2)
    with pytest.raises(ValueError, match="packs in one batch"):
        shelf.draw([(str(tmp_path / f"{i}.pack"), "sks toy", 0) for i in range(3)], SIZE, 2)
    shelf.clear()
    assert not getattr(pico.pipe.transformer, "peft_config", None)
    assert png_bytes(next(mokus.generate(pico, "a red ball"))) == before


# --- all of it ---------------------------------------------------------


def test_serve_as_a_whole(pico: Model, pico_folder: Path, pico_pack: PackFactory, tmp_path: Path) -> None:
    """From the command line to diffusers, and a graceful end."""
    pack = pico_pack(tmp_path / "packs" / "toy")
    pico_pack(tmp_path / "packs" / "with space")
    command = [sys.executable, "-m", "mokus", "serve", "--packs", str(tmp_path / "packs"), "--port", "0"]
    with (tmp_path / "stderr").open("w") as stderr, subprocess.Popen(
        [*command, "--model", str(pico_folder), "--device", "cpu"], stdout=subprocess.PIPE, stderr=stderr, text=True,
        env={**os.environ, "MOKUS_TOKEN": TOKEN},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "mokus: the pack 'with space' is not served, for" in (tmp_path / "stderr").read_text()
            client = Client(int(line.rpartition(":")[2].split("/")[0]), TOKEN)
            rows = json.loads(client.ask("GET", "/v1/models")[2])["data"]
            assert [row["id"] for row in rows] == [pico_folder.name, "toy"] and rows[1]["looks"]
            (image,) = client.images(model="toy", prompt="my favourite toy", seed=4)
            assert image == png_bytes(next(mokus.generate(pico, "my favourite toy", packs=[pack], seeds=[4])))
            status, told = client.draw(model="toy", prompt="<|im_start|>")
            assert status == 400 and "<|" in told["error"]["message"]
            asked = {"model": "toy", "prompt": "my favourite toy", "response_format": "safetensors"}
            status, _, data = client.ask("POST", "/v1/prompt_embeds", asked)
            assert status == 200
            engine = QwenImagePipeline.from_pretrained(
                pico_folder, text_encoder=None, tokenizer=None, dtype=torch.float32
            )
            engine.set_progress_bar_config(disable=True)
            engine.load_lora_weights(pack.path, weight_name=concept_pack.LORA)
            drawn = engine(
                **tensors_of(data), height=SIZE, width=SIZE, num_inference_steps=2, true_cfg_scale=4.0,
                generator=torch.Generator().manual_seed(4),
            ).images[0]  # fmt: skip
            assert np.array_equal(np.asarray(drawn), pixels(image))
            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(client.images, model="toy", prompt="my favourite toy", seed=4, n=4)
                until(lambda: last.done() or json.loads(client.ask("GET", "/healthz")[2])["drawing"])
                process.send_signal(signal.SIGTERM)
                assert len(last.result(240)) == 4
            assert process.wait(240) == 0
        finally:
            process.kill()
