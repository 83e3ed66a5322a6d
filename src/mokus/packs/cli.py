"""`mokus export`, `push` and `pull`: packs elsewhere. Heavy libraries are imported inside the commands."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mokus.console import Bars, JsonOption, PackArgument, load_model, note, print_json
from mokus.errors import MokusError

RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="A repository of the Hugging Face hub: me/toy.")]
DTYPES = ("bfloat16", "float16", "float32")


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    for command in (export, push, pull):
        app.command()(command)


def export(
    pack: PackArgument,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="comfyui, diffusers, kohya or merged.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="A new folder.", show_default="PACK-TARGET here")
    ] = None,
    *,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of merged weights: bfloat16, float16 or float32.", show_default="as stored; a hub id: bfloat16"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", envvar="MOKUS_MODEL", show_default="the miniature",
                     help="For merged: hub id or folder of the model that the pack is for."),
    ] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Write a pack for another program: ComfyUI, diffusers + peft, musubi-tuner (kohya), or merged into the whole model."""
    from mokus.memory import CPU
    from mokus.packs.export import check_place, check_target, output_of
    from mokus.packs.export import export as export_pack

    check_target(to)
    if dtype is not None and dtype not in DTYPES:
        raise MokusError(f"there is no dtype {dtype!r} for weights here, expected one of {', '.join(DTYPES)}.")
    if dtype is not None and to != "merged":
        raise MokusError(f"--dtype goes with --to merged, and {to} keeps the pack's own float32; leave it out.")
    from mokus.packs.concept_pack import ConceptPack

    opened = ConceptPack.open(pack)
    check_place(output_of(opened, to, output))  # before a large model is loaded
    # whatever tier was asked for: what is written are plain weights
    loaded = load_model(model, "cpu", _dtype(model, dtype), CPU.name) if to == "merged" else None
    with Bars() as progress:
        done = export_pack(opened, to, output, loaded, progress)
    for sentence in done.notes:
        note(f"{sentence}.")
    if as_json:
        return print_json({**asdict(done), "path": str(done.path)})
    for name in done.files if to != "merged" else ("README.md",):
        typer.echo(str(done.path / name))


def push(
    pack: PackArgument,
    repo: RepoArgument,
    *,
    public: Annotated[bool, typer.Option("--public", help="Let everyone read it; otherwise it is private.")] = False,
    photos: Annotated[
        Path | None, typer.Option(help="Upload the photos in this folder as well.", show_default="no photos")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The model's hub id, for a pack that was made with a folder of yours."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a pack to the hub with its model card, in one commit. Says first what becomes readable, and for whom."""
    from mokus.packs.concept_pack import ConceptPack
    from mokus.packs.hub import push as push_pack

    done = push_pack(ConceptPack.open(pack), repo, public=public, base_model=base_model, photos=photos, warn=note)
    if as_json:
        return print_json(asdict(done))
    typer.echo(f"{done.url} ({'private' if done.private else 'public'})")
    typer.echo(f"next: mokus pull {done.repo} --revision {done.revision}")


def pull(
    repo: RepoArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PACK", help="A new folder.", show_default="REPO's name, here"),
    ] = None,
    *,
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit.", show_default="what is newest")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a pack from the hub, of one commit, and check all of it. Nothing in it is run."""
    from mokus.packs.hub import pull as pull_pack

    done = pull_pack(repo, output, revision)
    found: dict[str, Any] = {
        "pack": str(done.pack.path), "repo": done.repo, "revision": done.revision, "anchor": done.pack.anchor,
        "base_model": done.pack.base_model, "knowledge": [known.text for known in done.pack.knowledge],
    }  # fmt: skip
    if as_json:
        return print_json(found)
    typer.echo(f"{done.pack.path}: {done.pack.anchor!r}, from {done.repo} at {done.revision}")
    typer.echo(f"next: mokus show {done.pack.path}")


def _dtype(model: str | None, given: str | None) -> Any:
    import torch

    from mokus.packs.export import stored_dtype

    return getattr(torch, given) if given else stored_dtype(model) or torch.bfloat16
