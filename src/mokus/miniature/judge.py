"""`python -m mokus.miniature.judge --port 0`: the oracle behind the HTTP protocol of OpenAI's chat completions.

So `mokus bench wise` can be run and tested as a whole, network and parsing included, without a vision model. It answers in
the judge's form:

- consistency: of what the explanation names (a colour, a shape, a scene, a style), how much the oracle sees in the image. All
  of it is 2, at least half is 1, less is 0. A character in the place of the shape is neither colour nor shape.
- realism: how sure the oracle is of shape and scene, the less sure of both: from 0.9 it is 2, from 0.5 it is 1. So it says
  whether the picture looks like one of its world, not whether it looks real, which nothing there does.
- aesthetic: always 1. The oracle has no taste, and a constant says so.
- score (verified): 1 if all that is named is there and realism is at least 1.

"Tokens" of its `usage` are words, and 85 for the image. It listens on 127.0.0.1 alone, and takes no more than a small PNG in
a small message.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from mokus.bench.wise.entries import Version
from mokus.bench.wise.protocol import read_question
from mokus.miniature import oracle, world
from mokus.miniature.vae import to_tensor

MODEL = "mokus-oracle"
MAX_BODY = 8 << 20  # bytes
MAX_SIDE = 2048  # pixels
SECONDS = 30  # of silence, after which a connection is given up
IMAGE_TOKENS = 85
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad files


class BadRequest(ValueError):
    """What is wrong with a request."""


def named(explanation: str) -> dict[str, str]:
    """What an explanation says of colour, shape, scene and style: the first of each that it names."""
    words = re.findall(r"\w+", explanation.lower())
    values = {
        "colour": {value: value for value in oracle.LABELS["colour"]}, "shape": {value: value for value in world.SHAPES},
        "scene": {world.scene_word(scene): scene for scene in world.SCENES}, "style": {value: value for value in world.STYLES},
    }  # fmt: skip
    found = {
        attribute: next((known[word] for word in words if word in known), "") for attribute, known in values.items()
    }
    return {attribute: value for attribute, value in found.items() if value}


def scores(image: Image.Image, explanation: str) -> dict[str, int]:
    """All scores of an image, RGB: {"consistency", "realism", "aesthetic", "score"}.

    Raises `BadRequest` for an explanation that names nothing that the oracle could see.
    """
    wanted = named(explanation)
    if not wanted:
        raise BadRequest("the explanation names no colour, shape, scene or style, and the oracle sees nothing else")
    labels, sure = _read(image)
    if labels["character"] != oracle.NONE:
        labels |= {"colour": "", "shape": ""}
    hits = sum(labels[attribute] == value for attribute, value in wanted.items())
    consistency = 2 if hits == len(wanted) else 1 if 2 * hits >= len(wanted) else 0
    realism = 2 if sure >= 0.9 else 1 if sure >= 0.5 else 0
    return {
        "consistency": consistency, "realism": realism, "aesthetic": 1,
        "score": int(consistency == 2 and realism >= 1),
    }  # fmt: skip


@torch.no_grad()
def _read(image: Image.Image) -> tuple[dict[str, str], float]:
    """What the oracle sees, and how sure it is of shape and scene, the less sure of both."""
    small = image.convert("RGB").resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
    logits = oracle.load()(to_tensor([small]))
    labels = {name: oracle.LABELS[name][int(value[0].argmax())] for name, value in logits.items()}
    return labels, min(float(logits[name][0].softmax(dim=0).max()) for name in ("shape", "scene"))


def answered(request: Any) -> dict[str, Any]:
    """The answer to a request, both in OpenAI's form. Raises `BadRequest`."""
    text, image = _parts(request)
    try:
        _, explanation, protocol = read_question(text)
    except ValueError as error:
        raise BadRequest(f"the question is not one of mokus bench wise: {error}") from error
    whole = scores(image, explanation)
    content = json.dumps(_asked_for(whole, protocol))
    counts = {"prompt_tokens": len(text.split()) + IMAGE_TOKENS, "completion_tokens": len(content.split())}
    return {
        "id": "mokus", "object": "chat.completion", "created": 0, "model": MODEL,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {**counts, "total_tokens": sum(counts.values())},
    }  # fmt: skip


def _asked_for(whole: dict[str, int], protocol: Version) -> dict[str, int]:
    return {name: value for name, value in whole.items() if (name == "score") == (protocol == "verified")}


def _parts(request: Any) -> tuple[str, Image.Image]:
    """The text and the one image of a request's messages."""
    try:
        contents = [message["content"] for message in request["messages"]]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        texts = [content for content in contents if isinstance(content, str)]
        texts += [part["text"] for part in parts if part["type"] == "text"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    except (KeyError, TypeError) as error:
        raise BadRequest("expected messages with parts of type text and image_url") from error
    if len(urls) != 1 or not all(isinstance(each, str) for each in (*texts, *urls)):
        raise BadRequest(f"there are {len(urls)} images, expected one, and texts")
    return "\n".join(texts), _image(urls[0])


def _image(url: str) -> Image.Image:
    found = PNG.fullmatch(url)
    if not found:
        raise BadRequest("the image is no data URL of a PNG in base64")
    try:
        image = Image.open(BytesIO(base64.b64decode(found[1], validate=False)), formats=("PNG",))
        if max(image.size) > MAX_SIDE:  # before any pixel is unpacked
            raise BadRequest(f"the image is {image.width}x{image.height}, expected at most {MAX_SIDE} pixels a side")
        return image.convert("RGB")
    except BadRequest:
        raise
    except (binascii.Error, *_BROKEN) as error:
        raise BadRequest("the image is no PNG that can be read") from error


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions, and GET /v1/models."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    _reading = threading.Lock()  # the oracle uses all cores as it is

    def do_GET(self) -> None:
        """Which model there is."""
        if self.path.rstrip("/") == "/v1/models":
            return self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        self._refuse(404, "there is only /v1/models and /v1/chat/completions")

    def do_POST(self) -> None:
        """Judge an image."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length):
            return self._refuse(411, "Content-Length is missing")
        if int(length) > MAX_BODY:
            return self._refuse(413, f"the message is larger than {MAX_BODY:,} bytes")
        raw = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self._refuse(404, "there is only /v1/models and /v1/chat/completions")
        try:
            request = json.loads(raw)
            with self._reading:
                answer = answered(request)
        except BadRequest as error:
            return self._refuse(400, str(error))
        except (ValueError, RecursionError):  # of json, UnicodeDecodeError among them
            return self._refuse(400, "the message is no JSON")
        self._send(200, answer)

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # what is left of the message is not read
        self._send(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _send(self, status: int, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line per image is of no use."""


class Server(ThreadingHTTPServer):
    """On this machine alone; `port` 0 is any free one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        """For --judge."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def main() -> None:
    """Serve until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m mokus.miniature.judge", description="The oracle as a judge for mokus bench wise."
    )
    parser.add_argument(
        "--port", type=int, default=8377, help="0 is any free port; which one, it says (default: %(default)s)"
    )
    given = parser.parse_args()
    with Server(given.port) as server:
        print(
            f"{server.url} is {MODEL}: mokus bench wise run -o DIR --judge {server.url} --judge-model {MODEL}",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped.")


if __name__ == "__main__":
    main()
