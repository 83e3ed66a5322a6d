"""Train all of the miniature from nothing: `python -m mokus.miniature.train WORK`. Run it again to go on after a stop.

Every part checkpoints into WORK and is skipped once it is done; about four hours on two cores. Needs `mokus[train]`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mokus.miniature import assemble, clip, mmdit, oracle, segmenter, text_encoder, vae


def train(
    work: Annotated[Path, typer.Argument(help="Folder of checkpoints and results, resumed if it has some.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the finished pipeline goes.", show_default="WORK/weights")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(help="A pipeline folder whose text encoder, oracle and image transformer to begin with."),
    ] = None,
) -> None:
    """Train text encoder, VAE and image transformer, and the judges of images; put them together."""
    target = output or work / "weights"
    assemble.check_place(target)
    text_encoder.train(work, start_from=start_from)
    vae.train(work / "vae")
    oracle.train(work, start_from=start_from)
    clip.train(work)
    segmenter.train(work)
    mmdit.train(work, start_from=start_from)
    assemble.assemble(work, target)
    shutil.copytree(work / clip.FOLDER, target / clip.FOLDER)
    shutil.copy(work / segmenter.FILE, target / segmenter.FILE)
    print(f"the miniature is in {target}")


if __name__ == "__main__":
    typer.run(train)
