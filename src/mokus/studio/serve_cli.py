"""`mokus serve`. Heavy libraries are imported inside the command."""

from __future__ import annotations

import ipaddress
import signal
import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mokus.console import DeviceOption, ModelOption, err, note
from mokus.errors import MokusError
from mokus.settings import AT_ONCE


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    packs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of concept packs; each is served under its folder's name."),
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine it needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="MOKUS_TOKEN", help="What visitors must bring along; better not on the command line."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images drawn at a time, at most.", min=1)] = AT_ONCE,
    queue: Annotated[int, typer.Option(help="Images that may wait; beyond it visitors are told to try again.", min=1)] = 64,
    most_packs: Annotated[int, typer.Option("--most-packs", help="Packs kept in memory, at most.", min=1)] = 8,
    most_images: Annotated[int, typer.Option("--most-images", help="Images of one request, at most.", min=1)] = 8,
    most_prompt: Annotated[int, typer.Option("--most-prompt", help="Characters of a prompt, at most.", min=1)] = 1000,
    most_size: Annotated[
        int | None,
        typer.Option("--most-size", help="Side of a square, whose pixels are the most.", show_default="the model's", min=1),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:  # fmt: skip
    """Serve images over OpenAI's images API, with concept packs as models. Ctrl-C finishes what is being drawn."""
    _check_token(host, token)
    try:
        from mokus.studio.openai import check_folder
        from mokus.studio.serve import Limits, Server
    except ModuleNotFoundError as error:
        raise MokusError(f"serving needs {error.name}, which is not installed: pip install 'mokus[serve]'.") from error
    from mokus.studio.worker import Worker

    check_folder(packs)  # before the model is loaded
    limits = Limits(most_prompt, most_images, most_size, queue, batch, most_packs)
    with _listening(host, port) as listening, tempfile.TemporaryDirectory(prefix="mokus-serve-") as home:
        images = Path(home, "images")
        images.mkdir()
        with Worker(Path(home), model, device) as worker:
            with err.status("loading the model"):
                about = worker.call("describe").result()
            hosts = [host, listening.getsockname()[0]]
            server = Server(worker, about, packs, images, token=token, limits=limits, hosts=hosts)
            for name, why in server.models.left_out().items():
                note(f"the pack {name!r} is not served, for {why}.")
            for each in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it is done
                signal.signal(each, _done)
            typer.echo(f"serving {server.models.base} at http://{_written(listening.getsockname())}/v1")
            server.runner().run(sockets=[listening])


def _done(number: int, frame: Any) -> None:
    """The end of a server is no fault."""


def _check_token(host: str, token: str | None) -> None:
    """Raise `MokusError` for a server that others can reach and that asks for nothing."""
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise MokusError("the token is not usable, expected 8 or more plain characters without spaces.")
    if token is None and not _loopback(host):
        raise MokusError(
            f"others could reach a server at {host}, so it needs a token: set MOKUS_TOKEN, or leave --host out to serve "
            "this machine alone."
        )


def _loopback(host: str) -> bool:
    """Whether it is this machine alone."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise MokusError(f"--host got {host!r}, which is no address here; 127.0.0.1 is this machine alone.") from error
    return all(ipaddress.ip_address(each[4][0]).is_loopback for each in found)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, None)[0][0]
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise MokusError(f"{host}:{port} cannot be listened to ({error.strerror}); choose another --port.") from error


def _written(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
