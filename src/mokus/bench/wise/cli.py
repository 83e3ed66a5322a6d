"""`mokus bench wise`: entries of WISE into knowledge, edit, draw before and after, judge, report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mokus.console import (
    Bars,
    Commands,
    JsonOption,
    ModelOption,
    load_model,
    note,
    parse_seeds,
    print_json,
    results_folder,
)
from mokus.errors import MokusError

if TYPE_CHECKING:
    from mokus.bench.wise.entries import Entries, Version
    from mokus.bench.wise.judge import Judgement, JudgeSettings

wise = typer.Typer(cls=Commands, no_args_is_help=True, help="WISE: what a vision model sees before and after edits.")

MINIATURE = "miniature"

OutputOption = Annotated[Path, results_folder("Folder of the run; it resumes there.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", metavar="URL", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."),
]
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="The vision model's name there.")
]
ProtocolOption = Annotated[
    str, typer.Option(help="What the judge is asked: legacy, verified, both, or auto: as the data are.")
]
ConcurrencyOption = Annotated[int, typer.Option(help="Questions to the judge at once.", min=1, max=256)]
TimeoutOption = Annotated[float, typer.Option(help="Seconds for one answer of the judge.", min=0.1)]
AttemptsOption = Annotated[int, typer.Option(help="Requests for one judgement, at most.", min=1, max=50)]
PriceInOption = Annotated[float | None, typer.Option(help="What a million tokens cost that the judge reads.", min=0)]
PriceOutOption = Annotated[float | None, typer.Option(help="... that the judge writes.", min=0)]
OptionsOption = Annotated[
    str | None,
    typer.Option("--judge-options", metavar="JSON", help='More of each request, such as {"max_tokens": 2000}.'),
]  # fmt: skip


@wise.command()
def suite(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that the file goes into.")],
    development: Annotated[bool, typer.Option("--development", help="The smaller one, for tuning.")] = False,
) -> None:
    """Write the miniature's suite as a JSON file like those of WISE."""
    from mokus.bench.wise.miniature_suite import write

    typer.echo(str(write(output, development)))


@wise.command()
def run(
    source: Annotated[
        str, typer.Argument(metavar="WISE", help="Your clone of WISE, a folder or a file of it, or 'miniature'.")
    ] = MINIATURE,
    *,
    output: OutputOption,
    data: Annotated[str | None, typer.Option(help="legacy or verified, where the files do not say.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only of this category, subcategory or field; repeat.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first entries.", min=1)] = None,
    control_every: Annotated[int, typer.Option(help="Every n-th entry is a control, never edited.", min=0)] = 0,
    answers: Annotated[str, typer.Option(help="How explanations become answers: templates, llm.")] = "templates",
    batch: Annotated[int, typer.Option(help="Edits in a row, before they are dropped.", min=1)] = 10,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges: 0-3 or 0,5,7.")] = "0",
    editor: Annotated[str | None, typer.Option(help="How the text encoder is edited.", show_default="the model's own")] = None,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.", min=1)] = 8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1, show_default="the model's own")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=1, show_default="the model's own")] = None,
    model: ModelOption = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Write knowledge.json and plan.json, and stop there.")] = False,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    protocol: ProtocolOption = "auto",
    concurrency: ConcurrencyOption = 4,
    timeout: TimeoutOption = 120.0,
    attempts: AttemptsOption = 5,
    price_in: PriceInOption = None,
    price_out: PriceOutOption = None,
    judge_options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Edit, draw before and after; with --judge also judge and report. Exit code 1 if an item failed; run it again to go on."""
    from mokus.bench.state import alone
    from mokus.bench.wise import run as runner
    from mokus.bench.wise.knowledge import HOWS, made
    from mokus.bench.wise.protocol import chosen
    from mokus.settings import EditSettings

    if answers not in HOWS:
        raise MokusError(f"--answers got {answers!r}, expected one of {', '.join(HOWS)}.")
    whom = _settings(judge, judge_model, concurrency, timeout, attempts, price_in, price_out, judge_options)
    loaded = _entries(source, data).some(limit, category, control_every)
    protocols = chosen(protocol, loaded.version)
    numbers = parse_seeds(seeds)
    engine = load_model(model)
    edit = EditSettings.for_editor(engine.defaults, **({"editor": editor} if editor else {}))
    with alone(output):
        with Bars() as progress:
            knowledge = made(engine, loaded.entries, answers, output, progress)
            plan = runner.make_plan(engine, loaded, knowledge, batch, numbers, edit, steps=steps, size=size)
            runner.write_plan(engine, plan, output, _command())
            if without := [row for row in knowledge.values() if not row.answer]:
                note(
                    f"{len(without)} entries have no answer to edit; see {output / 'knowledge.json'}, which you may correct."
                )
            if plan_only:
                return _print_plan(plan, output, as_json)
            failed = runner.Runner(engine, plan, output, batch_size, progress).run()
        for each in failed[:10]:
            note(f"failed: entry {each.prompt_id}, {each.when}: {each.reason}")
        done = _judge(output, whom, protocols) if whom else True
    _finish(output, whom is not None, as_json, done and not failed)


@wise.command("judge")
def judge_(
    folder: FolderArgument,
    *,
    judge: Annotated[str, typer.Option("--judge", metavar="URL", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")],
    judge_model: Annotated[str, typer.Option("--judge-model", metavar="NAME", help="The vision model's name there.")],
    protocol: ProtocolOption = "auto",
    concurrency: ConcurrencyOption = 4,
    timeout: TimeoutOption = 120.0,
    attempts: AttemptsOption = 5,
    price_in: PriceInOption = None,
    price_out: PriceOutOption = None,
    judge_options: OptionsOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Judge the images of a run, and report. Exit code 1 if a judgement failed or is left to ask for; run it again to go on."""
    from mokus.bench.state import alone
    from mokus.bench.wise.protocol import chosen
    from mokus.bench.wise.run import read_plan

    whom = _settings(judge, judge_model, concurrency, timeout, attempts, price_in, price_out, judge_options)
    protocols = chosen(protocol, read_plan(folder)["version"])
    assert whom is not None
    with alone(folder):
        done = _judge(folder, whom, protocols)
    _finish(folder, True, as_json, done)


@wise.command()
def report(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Write results.json, report.md and report.html of a run that was judged."""
    _finish(folder, True, as_json, True)


# --- shared -----------------------------------------------------------------------------------------------------------


def _entries(source: str, data: str | None) -> Entries:
    from mokus.bench.wise.entries import VERSIONS, Entries, load

    if data is not None and data not in VERSIONS:
        raise MokusError(f"--data got {data!r}, expected one of {', '.join(VERSIONS)}.")
    if source != MINIATURE:
        return load(Path(source), data)
    from mokus.bench.knowcusbench.recipe import digest
    from mokus.bench.wise.miniature_suite import entries

    some = tuple(entries())
    return Entries(MINIATURE, "legacy", digest([entry.model_dump() for entry in some]), some)


def _settings(
    url: str | None, name: str | None, concurrency: int, timeout: float, attempts: int, price_in: float | None,
    price_out: float | None, options: str | None,
) -> JudgeSettings | None:  # fmt: skip
    """Whom to ask; found out before anything is drawn."""
    if url is None and name is None:
        return None
    if not (url and name):
        raise MokusError("--judge and --judge-model go together; give both, or neither and judge later.")
    from mokus.bench.wise.judge import JudgeSettings

    try:
        more = json.loads(options) if options else {}
    except ValueError as error:
        raise MokusError(f'--judge-options is no JSON ({error}), expected an object such as {{"top_p": 1}}.') from error
    if not isinstance(more, dict) or {"model", "messages", "stream"} & set(more):
        raise MokusError("--judge-options must be a JSON object, without model, messages and stream.")
    settings = JudgeSettings(
        url, name, concurrency, timeout, attempts, options=more, price_in=price_in, price_out=price_out
    )
    assert settings.endpoint
    return settings


def _command() -> str:
    return shlex.join(["mokus", *sys.argv[1:]])


def _judge(folder: Path, whom: JudgeSettings, protocols: list[Version]) -> bool:
    """Judge what is not judged; returns whether all of it is."""
    from mokus.bench.wise.judge import KEY_VARIABLE, Judge, questions, scored
    from mokus.bench.wise.report import JUDGE
    from mokus.bench.wise.run import read_plan
    from mokus.files import write_json

    asked = questions(folder, read_plan(folder), protocols, whom.model, whom.options)
    about = {"model": whom.model, "protocols": protocols, "price_in": whom.price_in, "price_out": whom.price_out}
    write_json(folder / JUDGE, about | {"options": whom.options, "command": _command()})
    judge = Judge(whom, folder, os.environ.get(KEY_VARIABLE, ""))
    with Bars() as progress:
        done: list[Judgement] = judge.ask_all(list(asked.values()), progress)
    failed = [each for each in done if each.status == "failed"]
    left = {each.key for each in asked.values() if not scored(folder, each.key)}
    for each in failed[:5]:
        note(f"not judged: {each.reason}")
    if judge.stopped_for:
        note(
            f"the judge is out of reach ({judge.stopped_for}); {len(left)} judgements are left; the same command goes on."
        )
    elif left:
        note(f"{len(left)} judgements failed; the same command asks for them again.")
    return not left


def _print_plan(plan: Any, output: Path, as_json: bool) -> None:
    counts = {
        "entries": len(plan.suite.entries), "edits": sum(len(batch.knowledge) for batch in plan.batches),
        "batches": len(plan.batches), "images": len(plan.items), "folder": str(output),
    }  # fmt: skip
    if as_json:
        return print_json(counts)
    typer.echo(
        f"{counts['entries']:,} entries, {counts['edits']:,} edits in {counts['batches']:,} batches, "
        f"{counts['images']:,} images; what is edited says {output / 'knowledge.json'}"
    )


def _finish(folder: Path, judged: bool, as_json: bool, well: bool) -> None:
    """Report, and exit with 1 if something is missing."""
    if judged:
        from mokus.bench.wise.report import write

        figures, paths = write(folder)
        if as_json:
            print_json(figures)
        else:
            _print_figures(figures)
            typer.echo(f"{paths[0]}; open {paths[-1]}")
    elif as_json:
        print_json({"folder": str(folder), "judged": False})
    else:
        typer.echo(
            f"the images are in {folder / 'images'}; next: mokus bench wise judge {folder} --judge URL --judge-model NAME"
        )
    if not well:
        raise typer.Exit(1)


def _print_figures(figures: dict[str, Any]) -> None:
    spent = figures["cost"]
    money = f", cost {spent['cost']:.4f}" if spent["cost"] is not None else ""
    typer.echo(
        f"{figures['judgements']['scored']:,} judgements: {spent['requests']:,} requests, {spent['tokens_in']:,} tokens in, "
        f"{spent['tokens_out']:,} out{money}"
    )
    for name, variant in figures["variants"].items():
        for what in ("edited", "controls"):
            row = variant[what]
            if row["before"] is not None:
                same = f", {row['unchanged']:.1%} unchanged" if what == "controls" else ""
                ratio = f" ({row['ratio']:.2f} times)" if row["ratio"] and what == "edited" else ""
                typer.echo(
                    f"{name}, {what}: {row['before']:.3f} before, {row['after']:.3f} after{ratio}{same}; "
                    f"{row['entries']:,} entries"
                )
