"""`mokus ui`. Heavy libraries are imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mokus.console import DeviceOption, ModelOption
from mokus.errors import MokusError

PORT = 7860


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ui)


def ui(
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where packs, photos, jobs and images are kept.",
                     show_default="the user's data folder"),
    ] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 takes any that is free.", min=0, max=65535)] = PORT,
    reports: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder with benchmark runs to show; may be repeated.",
                     show_default="HOME/reports"),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:  # fmt: skip
    """The studio in the browser: learn, bind, ask and draw. It answers this machine alone, and needs no network."""
    for folder in reports or []:
        if not folder.is_dir():
            raise MokusError(f"{folder} is no folder; --reports expects one with benchmark runs in it.")
    try:
        from mokus.studio.ui import launch
    except ModuleNotFoundError as error:
        raise MokusError(f"the studio needs {error.name}, which is not installed; pip install 'mokus[ui]'.") from error
    import platformdirs

    launch(
        home or platformdirs.user_data_path("mokus"), port, model, device, [each.resolve() for each in reports or []],
        browser, typer.echo,
    )  # fmt: skip
