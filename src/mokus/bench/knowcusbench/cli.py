"""`mokus bench knowcus`: check the photos, run the methods, sweep settings, write the report."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mokus.bench.knowcusbench.methods import METHODS, method
from mokus.console import (
    Bars,
    Commands,
    JsonOption,
    ModelOption,
    SeedsOption,
    load_model,
    note,
    parse_names,
    parse_seeds,
    print_json,
    results_folder,
    stdout,
)
from mokus.errors import MokusError
from mokus.files import read_json

if TYPE_CHECKING:
    from mokus.bench.knowcusbench.manifest import Suite
    from mokus.bench.knowcusbench.methods import Method
    from mokus.bench.knowcusbench.run import Estimate, Failed

knowcus = typer.Typer(cls=Commands, no_args_is_help=True, help="KnowCusBench: knowledge-aware customization, measured.")

SuiteOption = Annotated[str, typer.Option(help="miniature, knowcus, or a file in the same schema (YAML or JSON).")]
FolderOption = Annotated[Path, results_folder("Folder of the run; it resumes there.")]
DreamBenchOption = Annotated[
    Path | None, typer.Option("--dreambench", metavar="DIR", help="Folder of DreamBench's photos.")
]
CustomOption = Annotated[
    Path | None, typer.Option("--customconcept101", metavar="DIR", help="Folder of CustomConcept101's photos.")
]
PhotosOption = Annotated[
    list[str] | None,
    typer.Option("--photos", metavar="SOURCE=DIR", help="Folder of another source of the suite; repeat."),
]
ConceptsOption = Annotated[
    str | None, typer.Option(help="Which, with commas between them.", show_default="all of them")
]
BatchOption = Annotated[int, typer.Option(help="Images drawn at once.", min=1)]
LearnStepsOption = Annotated[
    int | None, typer.Option(help="Steps of stage 1; few for a rehearsal.", min=1, show_default="the model's own")
]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.", min=1, show_default="the model's own")]
SizeOption = Annotated[
    int | None, typer.Option(help="Height and width in pixels.", min=1, show_default="the model's own")
]
ClipOption = Annotated[
    str | None, typer.Option(help="Hub id or folder of a CLIPModel.", show_default="the suite's own choice")
]
DinoOption = Annotated[str | None, typer.Option(help="... of a ViTModel.", show_default="the suite's own choice")]
PickOption = Annotated[str | None, typer.Option(help="... of PickScore.", show_default="the suite's own choice")]
DetectorOption = Annotated[str | None, typer.Option(help="... of Grounding DINO.", show_default="the suite's own")]
SegmenterOption = Annotated[str | None, typer.Option(help="... of SAM 2.", show_default="the suite's own choice")]
WithoutOption = Annotated[
    str | None,
    typer.Option(help="Metrics to leave out, with commas between them: clip, clip_i_seg, dino, pick, oracle."),
]


@knowcus.command()
def check(
    suite: SuiteOption = "knowcus",
    dreambench: DreamBenchOption = None,
    customconcept101: CustomOption = None,
    photos: PhotosOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a suite asks, which of its photos are there, which are missing, and where they come from."""
    from mokus.bench.knowcusbench.manifest import check_photos, load_suite

    loaded = load_suite(suite)
    states = check_photos(loaded, _roots(loaded, dreambench, customconcept101, photos))
    missing = [state for state in states if state.problem]
    if as_json:
        found = [{**asdict(each), "folder": each.folder and str(each.folder), "state": each.state} for each in states]
        print_json({"suite": loaded.name, "counts": loaded.counts(), "photos": found})
    else:
        for what, number in _flat(loaded.counts()):
            typer.echo(f"{number:7,d}  {what}")
        table = Table("concept", "source", "photos", "", box=None, pad_edge=False)
        for state in states:
            table.add_row(state.concept, state.source, str(state.photos or state.state), state.problem or "")
        stdout(width=130).print(table)
        typer.echo(f"{len(states) - len(missing)} of {len(states)} concepts are ready")
        for name in dict.fromkeys(state.source for state in missing):
            source = loaded.sources[name]
            typer.echo(f"{name}: {source.about} {source.url} ({source.licence})")
    if missing:
        raise typer.Exit(1)


@knowcus.command()
def run(
    output: FolderOption,
    suite: SuiteOption = "miniature",
    methods: Annotated[str | None, typer.Option(help="Which, with commas between them.", show_default="all")] = None,
    seeds: SeedsOption = "0-4",
    concepts: ConceptsOption = None,
    dreambench: DreamBenchOption = None,
    customconcept101: CustomOption = None,
    photos: PhotosOption = None,
    model: ModelOption = None,
    batch_size: BatchOption = 32,
    learn_steps: LearnStepsOption = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print what would be done, and do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw every image of a suite by every method. Run it again to go on; `accelerate launch` shares it out by concepts."""
    names = _names(methods, METHODS)
    asked = _Asked(
        output, suite, parse_seeds(seeds), concepts, (dreambench, customconcept101, photos), model, batch_size, learn_steps,
        steps, size, as_json,
    )  # fmt: skip
    _run(asked, {name: method(name) for name in names}, plan_only)


@knowcus.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    suite: Annotated[str | None, typer.Option(help="Its suite.", show_default="where the run found it")] = None,
    dreambench: DreamBenchOption = None,
    customconcept101: CustomOption = None,
    photos: PhotosOption = None,
    clip: ClipOption = None,
    dino: DinoOption = None,
    pick: PickOption = None,
    detector: DetectorOption = None,
    segmenter: SegmenterOption = None,
    without: WithoutOption = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score what is not scored yet, and write results.json, report.md and report.html."""
    from mokus.bench.knowcusbench import report as page

    models = {"clip": clip, "dino": dino, "pick": pick, "detector": detector, "segmenter": segmenter}
    _score(folder, suite, (dreambench, customconcept101, photos), device, without, **models)
    results, files = page.write(folder)
    if as_json:
        return print_json(results)
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"{folder / 'results.json'}; open {next(file for file in files if file.suffix == '.html')}")


@knowcus.command()
def ablate(
    output: FolderOption,
    sweep: Annotated[str, typer.Option(help="Which, with commas between them: knowledge, eta, layers.")] = "knowledge",
    suite: SuiteOption = "miniature",
    seeds: SeedsOption = "0-4",
    concepts: ConceptsOption = None,
    dreambench: DreamBenchOption = None,
    customconcept101: CustomOption = None,
    photos: PhotosOption = None,
    model: ModelOption = None,
    batch_size: BatchOption = 32,
    learn_steps: LearnStepsOption = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    clip: ClipOption = None,
    dino: DinoOption = None,
    pick: PickOption = None,
    detector: DetectorOption = None,
    segmenter: SegmenterOption = None,
    without: WithoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sweep the number of pieces of knowledge, the editor's step size or its layers, in the folder of a run; score that."""
    from mokus.bench.knowcusbench import ablate as sweeps
    from mokus.bench.knowcusbench.manifest import load_suite
    from mokus.pipeline import defaults_of
    from mokus.training.processes import Processes

    names = parse_names(sweep)
    for name in names:
        if name not in sweeps.SWEEPS:
            raise MokusError(f"there is no sweep {name!r}, expected some of {', '.join(sweeps.SWEEPS)}.")
    chosen = sweeps.chosen(load_suite(suite), names, defaults_of(model))
    methods = {name: each for one in chosen for name, each in one.methods.items()}
    asked = _Asked(
        output, suite, parse_seeds(seeds), concepts, (dreambench, customconcept101, photos), model, batch_size, learn_steps,
        steps, size, as_json,
    )  # fmt: skip
    failed = _run(asked, methods, part=sweeps.first_alone, last=False)
    if failed is None:
        return
    models = {"clip": clip, "dino": dino, "pick": pick, "detector": detector, "segmenter": segmenter}
    _score(output, suite, asked.roots, None, without, **models)
    sweeps.write(output, chosen)
    if as_json:
        print_json(read_json(output / "ablation.json"))
    else:
        typer.echo(f"{output / 'ablation.json'}; 'mokus bench knowcus report {output}' draws it")
    Processes.of_environment().leave()
    if failed:
        raise typer.Exit(1)


# --- shared -----------------------------------------------------------------------------------------------------------


def _roots(suite: Suite, dreambench: Path | None, custom: Path | None, photos: list[str] | None) -> dict[str, Path]:
    """The folder of each source that has one."""
    roots = {name: path for name, path in (("dreambench", dreambench), ("customconcept101", custom)) if path}
    for each in photos or ():
        name, found, folder = each.partition("=")
        if not found or name not in suite.sources:
            raise MokusError(f"--photos got {each!r}, expected SOURCE=DIR with a source of {', '.join(suite.sources)}.")
        roots[name] = Path(folder)
    for name, path in roots.items():
        if not path.is_dir():
            raise MokusError(
                f"the folder of {name}, {path}, is not there; name the one that holds a folder per concept."
            )
    return roots


def _names(text: str | None, known: tuple[str, ...]) -> list[str]:
    names = parse_names(text) if text is not None else list(known)
    for name in names:
        method(name)
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class _Asked:
    """Options that runs and sweeps have in common, as the commands have them; `roots` as `_roots` takes them."""

    output: Path
    suite: str
    seeds: list[int]
    concepts: str | None
    roots: tuple[Path | None, Path | None, list[str] | None]
    model: str | None
    batch_size: int
    learn_steps: int | None
    steps: int | None
    size: int | None
    as_json: bool


def _run(
    asked: _Asked, methods: dict[str, Method], plan_only: bool = False,
    part: Callable[[Suite], Suite] = lambda suite: suite, last: bool = True,
) -> list[Failed] | None:  # fmt: skip
    """Plan, say so, and draw. Returns what failed, or None if another process goes on.

    `part`: what of the suite is drawn. `last`: nothing comes after it, so what was drawn is said, and if something failed it
    ends with exit code 1, in the first process alone. Otherwise the first has to leave the others when it is done; they wait
    for it here.
    """
    from mokus.bench.knowcusbench import run as runner
    from mokus.bench.knowcusbench.manifest import load_suite
    from mokus.bench.knowcusbench.plan import make_plan
    from mokus.bench.state import alone
    from mokus.settings import LearnSettings
    from mokus.training.processes import Processes

    loaded = load_suite(asked.suite)
    folders = _roots(loaded, *asked.roots)
    several = Processes.of_environment()
    engine = load_model(asked.model, several.device)
    learn = LearnSettings.for_model(engine.defaults.learn)
    learn = replace(learn, steps=asked.learn_steps) if asked.learn_steps else learn
    names = parse_names(asked.concepts) if asked.concepts is not None else None
    plan = make_plan(
        engine, part(loaded), methods, asked.seeds, folders, names, learn, steps=asked.steps, size=asked.size
    )
    if several.first:
        expected = runner.estimate(engine, plan, asked.output, asked.batch_size)
        if not asked.as_json:
            _say(plan_lines(loaded, plan.items, expected, several.count))
        if plan_only:
            if asked.as_json:
                print_json({"counts": loaded.counts(), **asdict(expected)})
            return []
    elif plan_only:
        return None
    with alone(asked.output) if several.first else nullcontext():
        if several.first:
            runner.write_plan(engine, replace(plan, suite=loaded), asked.output, asked.seeds, _command(), asked.suite)
        several.wait()
        with Bars() if several.first else nullcontext() as progress:
            work = runner.Runner(engine, plan, asked.output, asked.batch_size, progress)
            failed = work.run(runner.Shard(several.index, several.count), note)
        failed = several.gathered(failed)
        if several.first:
            runner.write_training(plan, work.shelf, asked.output)
            runner.write_failed(plan, failed, asked.output)
    if not several.first:
        several.leave()
        return None
    _finish(asked.output, plan.images(), failed, asked.as_json, last)
    if last:
        several.leave()
    if failed and last:
        raise typer.Exit(1)
    return failed


def plan_lines(suite: Suite, items: list[Any], expected: Estimate, processes: int) -> list[str]:
    """What a run amounts to, in words."""
    counts = Counter((item.method, item.kind) for item in items)
    lines = [f"{suite.name}: {len({item.concept for item in items})} concepts"]
    for name in dict.fromkeys(item.method for item in items):
        both = (counts[name, "reconstruction"], counts[name, "generation"])
        lines.append("  {}: {:,} reconstructions, {:,} generations".format(name, *both))
    minutes = expected.seconds / 60 / processes
    lines.append(
        f"{len(items):,} images in all, {len({item.key for item in items}):,} of them different; to do: {expected.images:,} "
        f"images, {expected.learned} trainings, {expected.bound} pieces of knowledge; about {minutes:.0f} min and "
        f"{expected.bytes / 1e6:.0f} MB"
    )
    return lines


def _say(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _command() -> str:
    return shlex.join(["mokus", *sys.argv[1:]])


def _finish(output: Path, images: dict[str, Any], failed: list[Failed], as_json: bool, last: bool) -> None:
    if last and as_json:
        print_json({"images": len(images), "failed": [asdict(each) for each in failed], "folder": str(output)})
    elif last:
        typer.echo(f"{len(images) - len(failed):,} images are in {output / 'images'}")
    for each in failed[:20]:
        note(f"failed: {each.method}, {each.concept}, {each.key}: {each.reason}")
    if len(failed) > 20:
        note(f"... and {len(failed) - 20} more, see {output / 'failed.json'}.")


def _score(
    folder: Path, suite: str | None, roots: Any, device: str | None, without: str | None, **models: str | None
) -> None:  # fmt: skip
    """Score what is not scored yet."""
    from mokus.bench.knowcusbench.manifest import load_suite
    from mokus.bench.knowcusbench.metrics import metrics_for
    from mokus.bench.knowcusbench.plan import read_plan
    from mokus.bench.knowcusbench.score import score

    loaded = load_suite(suite or read_plan(folder)["suite_file"])
    chosen = {name: value for name, value in models.items() if value}
    metrics = metrics_for(loaded.rendered, [name for name in parse_names(without or "") if name], device, **chosen)
    with Bars() as progress:
        score(folder, loaded, metrics, _roots(loaded, *roots), progress)


def _flat(counts: Any, above: str = "") -> list[tuple[str, int]]:
    """Nested counts as lines."""
    if not isinstance(counts, dict):
        return [(above, counts)]
    return [line for key, value in counts.items() for line in _flat(value, f"{above}: {key}" if above else str(key))]
