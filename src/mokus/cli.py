"""The command line: learn, bind, ask, generate and the rest. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mokus import __version__, uses_cli
from mokus.bench import uses_cli as bench_uses_cli
from mokus.bench.editing.cli import editing
from mokus.bench.knowcusbench.cli import knowcus
from mokus.bench.wise.cli import wise
from mokus.console import (
    Bars,
    Commands,
    DeviceOption,
    JsonOption,
    KeepOption,
    ModelOption,
    PackArgument,
    SeedsOption,
    file_names,
    hush,
    load_model,
    note,
    open_pack,
    parse_seeds,
    parse_size,
    print_edits,
    print_json,
    results_folder,
    settings_options,
    stdout,
    visible,
)
from mokus.doctor import cli as doctor_cli
from mokus.errors import MokusError
from mokus.packs import cli as packs_cli
from mokus.packs.files import check_free
from mokus.settings import AT_ONCE, EditSettings, LearnSettings
from mokus.studio import serve_cli, ui_cli

if TYPE_CHECKING:
    from mokus.low_rank import Shifts
    from mokus.packs.concept_pack import ConceptPack
    from mokus.training.processes import Processes

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Photos of a thing and a few plain sentences about it in, images that know what you mean out.",
)

bench = typer.Typer(cls=Commands, no_args_is_help=True, help="Benchmarks, most of them of the miniature.")
app.add_typer(bench, name="bench")
bench.add_typer(knowcus, name="knowcus")
bench.add_typer(wise, name="wise")
bench.command()(editing)
bench_uses_cli.register(bench)

PackOption = Annotated[list[Path] | None, typer.Option("--pack", help="A concept pack to use; may be repeated.")]
PreferOption = Annotated[
    Path | None,
    typer.Option(
        "--prefer", metavar="PACK", help="The pack whose meaning counts, for a phrase that several packs bind."
    ),
]


@app.command()
@settings_options(LearnSettings)
def learn(
    photos: Annotated[
        Path | None,
        typer.Argument(metavar="PHOTOS", show_default=False, help="A folder of jpg, png or webp photos, at least one."),
    ] = None,
    anchor: Annotated[str | None, typer.Option(help="A rare token and the class word: 'sks toy'.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PACK", help="Where the concept pack goes.")
    ] = None,
    *,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Many concepts instead: a YAML list of photos, anchor, output and, if wanted, settings. Run again, it goes on.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a stopped run of the same command.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a concept pack that is there, and the knowledge in it.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    chosen: dict[str, Any],
) -> None:
    """Learn what a concept looks like from a few photos (stage 1).

    By several processes, or many concepts: docs/several_gpus.md. With --batch the exit code is 1 if some concept failed.
    """
    if batch is not None:
        if photos is not None or anchor is not None or output is not None or resume or overwrite:
            raise MokusError(
                "--batch has photos, anchors and outputs in its file and goes on where it was stopped; leave out PHOTOS, "
                "--anchor, --output, --resume and --overwrite."
            )
        return _learn_batch(batch, model, device, as_json, chosen)
    if photos is None or anchor is None or output is None:
        missing = "argument 'PHOTOS'" if photos is None else f"option '--{'anchor' if anchor is None else 'output'}'"
        raise MokusError(
            f"Missing {missing}: expected PHOTOS, --anchor and --output, or --batch with a file of many concepts; "
            "see 'mokus learn --help'."
        )
    check_free(output, overwrite)
    _check_photos(photos)
    processes = _processes(device)
    loaded = load_model(model, processes.device or device)
    from mokus.training.checkpoint import checkpoint_of
    from mokus.visual_concept import learn

    began = time.perf_counter()
    settings = LearnSettings.for_model(loaded.defaults.learn, **chosen)
    try:
        with Bars(hidden=not processes.first) as progress:
            pack = learn(
                loaded, photos, anchor, output, settings=settings, resume=resume, overwrite=overwrite, progress=progress,
                processes=processes,
            )  # fmt: skip
    except KeyboardInterrupt:
        if checkpoint_of(output).is_file():
            note(f"--resume goes on from the last checkpoint; there is one every {settings.checkpoint_every} steps.")
        raise
    seconds = time.perf_counter() - began
    if not processes.first:
        return
    if as_json:
        return print_json({**_summary(pack), "seconds": seconds})
    typer.echo(f"learned {pack.anchor!r} in {seconds:.1f} s: {pack.path}")
    if previews := len(list((pack.path / "samples").glob("*.png"))):
        typer.echo(f"previews: {previews} in {pack.path / 'samples'}")
    typer.echo(f'next: mokus bind {pack.path} "my favourite {pack.class_word}"')


@app.command()
@settings_options(EditSettings)
def bind(
    pack: PackArgument,
    knowledge: Annotated[
        list[str],
        typer.Argument(metavar="KNOWLEDGE...", help="Phrases that shall mean the concept: 'my favourite toy'."),
    ],
    *,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="Ask for the (one) knowledge in these words; may be repeated."),
    ] = None,
    keep: KeepOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    chosen: dict[str, Any],
) -> None:
    """Bind knowledge to the concept (stage 2). Exit code 1 if some knowledge did not take; it is then left unbound."""
    if question and len(knowledge) > 1:
        raise MokusError(
            f"--question goes with one knowledge, and {len(knowledge)} were given; bind them one at a time."
        )
    opened = open_pack(pack)
    loaded = load_model(model, device, text_alone=True)
    from mokus.knowledge_update import bind

    settings = EditSettings.for_editor(loaded.defaults, **chosen)
    with Bars() as progress:
        edits = bind(
            loaded,
            opened,
            *knowledge,
            questions=question or None,
            keep=keep or (),
            settings=settings,
            progress=progress,
        )
    if as_json:
        print_json([edit.as_json() for edit in edits])
    else:
        print_edits(edits)
    if not all(edit.taken for edit in edits):
        raise typer.Exit(1)


@app.command()
def unbind(
    pack: PackArgument,
    knowledge: Annotated[
        list[str], typer.Argument(metavar="KNOWLEDGE...", help="Phrases to forget, as they were bound.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Take knowledge out of a pack: exactly its part, what else is bound stays as it is."""
    opened = open_pack(pack)
    from mokus.knowledge_update import unbind

    unbind(opened, *knowledge)
    if as_json:
        return print_json(_summary(opened))
    typer.echo(f"unbound {', '.join(map(repr, knowledge))}; {len(opened.knowledge)} left in {pack}")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="'What is my favourite toy?'")],
    pack: PackOption = None,
    prefer: PreferOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the text encoder a question, with the knowledge of packs or without."""
    if not question.strip():
        raise MokusError("the question is empty, expected one such as 'What is my favourite toy?'.")
    opened = [open_pack(path) for path in pack or []]
    shifts = _together(opened, prefer)
    loaded = load_model(model, device, text_alone=True)
    from mokus.checks import ask

    for each in opened:
        each.check_base(loaded)
    answer = ask(loaded, question, shifts)
    if as_json:
        used = {"packs": [str(each.path) for each in opened], **({"prefer": str(prefer)} if prefer else {})}
        return print_json({"question": question, "answer": answer, **used})
    typer.echo(visible(answer))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="'my favourite toy in the snow'")],
    *,
    output: Annotated[
        Path,
        results_folder("Folder of the images; what is there of other settings stays."),
    ] = Path("outputs"),
    pack: PackOption = None,
    prefer: PreferOption = None,
    seeds: SeedsOption = "0",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's", min=1)] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none.", show_default="the model's")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from.", show_default="the model's")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Pixels: 1024, or width and height: 1664x928.", show_default="the model's, a square"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time; changes speed and memory, not the images.", min=1)
    ] = AT_ONCE,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw prompts, with the concepts and the knowledge of packs or without: one PNG per prompt and seed."""
    numbers, prompts, sides = parse_seeds(seeds), list(dict.fromkeys(prompts)), parse_size(size)
    opened = [open_pack(path) for path in pack or []]
    _together(opened, prefer)
    loaded = load_model(model, device)
    from mokus.generation import generate, place_of, save_png

    with Bars() as progress:
        results = generate(
            loaded, prompts, packs=opened, seeds=numbers, batch_size=batch_size, steps=steps,
            true_cfg_scale=true_cfg_scale, size=sides, negative_prompt=negative_prompt, progress=progress,
            prefer=prefer,
        )  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)  # only now: what cannot be drawn leaves no folder
        names, rows = file_names(prompts), []
        for result in results:
            file = place_of(result, output / f"{names[result.prompt]}-{result.seed}.png")
            save_png(result, file)
            rows.append({"file": str(file), "prompt": result.prompt, "seed": result.seed, "settings": result.settings})
    if as_json:
        return print_json(rows)
    for row in rows:
        typer.echo(row["file"])


@app.command()
def demo(
    output: Annotated[
        Path,
        results_folder("Folder of the report and the pack; those of an earlier demo there are replaced."),
    ] = Path("demo"),
    photos: Annotated[Path | None, typer.Option(help="Your own photos.", show_default="5 rendered ones")] = None,
    anchor: Annotated[str, typer.Option(help="A rare token and the class word.")] = "sks toy",
    knowledge: Annotated[
        list[str] | None,
        typer.Option("--knowledge", help="What to bind; may be repeated.", show_default="five phrases"),
    ] = None,
    seeds: SeedsOption = "0-3",
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch all of it: learn, bind, ask and draw before and after, unbind; writes report.html and grid.png."""
    numbers = parse_seeds(seeds)
    from mokus import demo, report

    demo.check_place(output, photos)
    if photos is not None:
        _check_photos(photos)
    loaded = load_model(model, device)
    with Bars() as progress:
        story = demo.run(loaded, output, photos, anchor, knowledge or None, numbers, progress)
    page, grid = report.write(story, output)
    if as_json:
        return print_json({
            "report": str(page), "grid": str(grid), "pack": str(output / "pack"), "seconds": story.seconds,
            "figures": story.figures,
        })  # fmt: skip
    for row in story.figures:
        typer.echo(f"{row['share']:7.1%} of {row['n']:3d}  {row['what']}")
    taken = sum(edit.taken for edit in story.edits)
    typer.echo(f"{taken} of {len(story.edits)} phrases bound; {sum(story.seconds.values()):.0f} s in all; open {page}")


uses_cli.register(app)


@app.command()
def show(pack: PackArgument, as_json: JsonOption = False) -> None:
    """What is in a concept pack."""
    opened = open_pack(pack)
    if as_json:
        return print_json(_summary(opened))
    words = "" if opened.lora() else " (words alone)"
    typer.echo(f"{opened.path}: {opened.anchor!r}{words}, for {opened.base_model} ({opened.fingerprint[:12]})")
    table = Table("knowledge", "questions", "reads back", "editor", "steps", "alignment", box=None, pad_edge=False)
    for known in opened.knowledge:
        table.add_row(
            known.text,
            visible(" / ".join(known.questions)),
            visible(known.read_back),
            visible(known.editor),
            str(known.steps),
            f"{known.alignment:.2f}",
        )
    if opened.knowledge:
        stdout().print(table)
    else:
        typer.echo("no knowledge bound yet")
    if kept := list(dict.fromkeys(phrase for known in opened.knowledge for phrase in known.kept)):
        typer.echo(f"kept as they are: {', '.join(map(repr, kept))}")


packs_cli.register(app)
ui_cli.register(app)
serve_cli.register(app)
doctor_cli.register(app)

# --- shared by the commands ---------------------------------------------------------


def _learn_batch(file: Path, model: str | None, device: str | None, as_json: bool, chosen: dict[str, Any]) -> None:
    """`mokus learn --batch`."""
    from mokus.training.concept_batch import learn_all, read_concepts, told

    concepts = read_concepts(file)
    LearnSettings(**chosen)  # what is wrong with all of them is said once
    processes = _processes(device)
    loaded = load_model(model, processes.device or device)

    def bars() -> Bars:
        return Bars(transient=True, hidden=not processes.first)

    outcomes = learn_all(loaded, concepts, chosen, processes, bars, say=note)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if processes.first and as_json:
        print_json([vars(outcome) for outcome in outcomes])
    elif processes.first:
        typer.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} concepts are there")
        for outcome in failed:
            typer.echo(told(outcome))
    processes.leave()
    if failed and processes.first:
        raise typer.Exit(1)


def _processes(device: str | None) -> Processes:
    """Those that were launched; each has a device of its own, so none is to be named."""
    from mokus.training.processes import Processes

    found = Processes.of_environment()
    if found.count > 1 and device is not None:
        raise MokusError(
            f"--device got {device}, but {found.count} processes were launched, each with a device of its own; leave it out."
        )
    return found


def _check_photos(folder: Path) -> None:
    """Find bad photos before a large model is loaded, and say which files are passed over."""
    from mokus.photos import MIN_SIDE, load_photos

    load_photos(folder, MIN_SIDE, warn=note)


def _together(packs: list[ConceptPack], prefer: Path | None) -> list[Shifts]:
    """Find packs that contradict each other before a large model is loaded."""
    from mokus.packs.together import shifts_of

    return shifts_of(packs, prefer)


def _summary(pack: ConceptPack) -> dict[str, Any]:
    return {
        "pack": str(pack.path),
        "anchor": pack.anchor,
        "class_word": pack.class_word,
        "looks": bool(pack.lora()),  # else it is made of words alone
        "base_model": pack.base_model,
        "fingerprint": pack.fingerprint,
        "settings": pack.settings,
        "knowledge": [known.model_dump(exclude={"ranks"}) for known in pack.knowledge],
        "bytes": sum(file.stat().st_size for file in pack.path.rglob("*") if file.is_file()),
        "mokus": __version__,
    }


@app.callback(invoke_without_command=True)
def _version(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    tier: Annotated[
        str | None,
        typer.Option(
            help="How memory is used by whatever loads a model (MOKUS_TIER says it, too); see 'mokus doctor'.",
            show_default="the first that fits",
        ),
    ] = None,
) -> None:
    if version:
        typer.echo(f"mokus {__version__}")
        raise typer.Exit
    if tier is not None:
        doctor_cli.set_tier(ctx, tier)


def main() -> None:
    """The `mokus` command."""
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may be no UTF-8
    hush()
    app()
