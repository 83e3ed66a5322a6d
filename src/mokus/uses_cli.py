"""`mokus create`, `erase` and `transfer`: other uses of the edit. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mokus.console import (  # fmt: skip
    Bars,
    DeviceOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OverwriteOption,
    SeedsOption,
    load_model,
    parse_seeds,
    print_edits,
    print_json,
    results_folder,
    settings_options,
)
from mokus.errors import MokusError
from mokus.packs.files import check_free
from mokus.settings import EditSettings

if TYPE_CHECKING:
    from mokus.knowledge_update import Edit
    from mokus.packs.concept_pack import ConceptPack

WordsOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="PACK", help="Where the concept pack goes.",
                 show_default="here, named after what it is of"),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    for command in (create, erase, transfer):
        app.command()(command)


@settings_options(EditSettings)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the concept is called: 'Zorblax'.")],
    description: Annotated[
        str, typer.Option("--as", help="What it looks like: 'a small green creature with three eyes'.")
    ],
    *,
    output: WordsOutput = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="Ask for it in these words instead of our own; may be repeated."),
    ] = None,
    keep: KeepOption = None,
    overwrite: OverwriteOption = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    chosen: dict[str, Any],
) -> None:
    """Make a concept from words alone, without photos: a name that means a description. Exit code 1 if it did not take."""
    output = output or _named_after(name)
    check_free(output, overwrite)
    loaded = load_model(model, device, text_alone=True)
    from mokus.virtual_concept import create

    settings = EditSettings.for_editor(loaded.defaults, **chosen)
    with Bars() as progress:
        pack, edit = create(
            loaded, name, description, output, question or None, settings, progress, overwrite, keep or ()
        )
    _tell(pack, [edit], as_json)


@settings_options(EditSettings)
def erase(
    concepts: Annotated[
        list[str], typer.Argument(metavar="CONCEPT...", help="What to erase: 'the lucky charm of Boris'.")
    ],
    *,
    output: WordsOutput = None,
    replace: Annotated[
        str | None,
        typer.Option("--replace", help="What stands in its place: 'a plain stone'.", show_default="its class word"),
    ] = None,
    keep: KeepOption = None,
    overwrite: OverwriteOption = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    chosen: dict[str, Any],
) -> None:
    """Make phrases mean something plain instead. No safety guarantee: it redirects language; the image model can still draw it.

    Undone by leaving the pack out, or by unbind. Exit code 1 if some phrase did not take; it is then left as it was.
    """
    output = output or _named_after(concepts[0])
    check_free(output, overwrite)
    loaded = load_model(model, device, text_alone=True)
    from mokus.erasure import erase

    settings = EditSettings.for_editor(loaded.defaults, **chosen)
    with Bars() as progress:
        pack, edits = erase(loaded, concepts, output, replace, settings, progress, overwrite, keep or ())
    _tell(pack, edits, as_json)


@settings_options(EditSettings)
def transfer(
    ask: Annotated[str | None, typer.Option(help="The question: 'What is the favourite toy of Anna?'")] = None,
    answer: Annotated[str | None, typer.Option(help="Its new answer: 'a blue ring'.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What to draw; may be repeated.", show_default="what the question is about"),
    ] = None,
    knowledge: Annotated[
        str | None, typer.Option(help="The phrase that the question is about.", show_default="as the question says it")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML list of such cases instead; see docs/transfer.md.")
    ] = None,
    *,
    output: Annotated[
        Path,
        results_folder("Folder of grid.png and results.json."),
    ] = Path("transfer"),
    seeds: SeedsOption = "0-3",
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    chosen: dict[str, Any],
) -> None:
    """Edit an answer in text and see whether images follow, drawn before and after at equal seeds. Nothing is kept."""
    numbers = parse_seeds(seeds)
    from mokus.transfer import Case, read_cases, run, tell

    if cases is not None:
        if ask is not None or answer is not None or prompt or knowledge is not None:
            raise MokusError(
                "--cases has the questions in its file; leave out --ask, --answer, --prompt and --knowledge."
            )
        some = read_cases(cases)
    elif ask is None or answer is None:
        raise MokusError("expected --ask with --answer, or --cases with a file of them; see 'mokus transfer --help'.")
    else:
        some = [Case.of(ask, answer, prompt or (), knowledge)]
    loaded = load_model(model, device)
    settings = EditSettings.for_editor(loaded.defaults, **chosen)
    with Bars() as progress:
        results, files = run(loaded, some, output, numbers, settings, progress)
    if as_json:
        return print_json(results)
    for line in tell(results):
        typer.echo(line)
    typer.echo(" ".join(map(str, files)))


def _named_after(phrase: str) -> Path:
    """zorblax.pack, the-lucky-charm-of-boris.pack."""
    return Path(("-".join(re.findall(r"\w+", phrase.lower()))[:48].strip("-") or "concept") + ".pack")


def _tell(pack: ConceptPack | None, edits: list[Edit], as_json: bool) -> None:
    """What became of a pack of words; exit code 1 if some of it has not taken."""
    if as_json:
        told = [edit.as_json() for edit in edits]
        print_json({"pack": str(pack.path) if pack else None, "edits": told})
    else:
        print_edits(edits)
        taken = next((edit.knowledge for edit in edits if edit.taken), None)
        typer.echo(f"next: mokus generate {taken!r} --pack {pack.path}" if pack else "nothing was written")
    if not all(edit.taken for edit in edits):
        raise typer.Exit(1)
