"""`mokus doctor`, and the option `--tier`. Heavy libraries are imported inside the command."""

from __future__ import annotations

import os
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mokus.console import JsonOption, err, print_json, stdout
from mokus.errors import MokusError
from mokus.settings import AT_ONCE

if TYPE_CHECKING:
    from mokus.doctor.plan import Plan

TASKS = ("learn", "bind", "generate")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def set_tier(ctx: typer.Context, name: str) -> None:
    """Have whatever loads a model in this command use the memory tier of this name."""
    from mokus.memory import VARIABLE, tier

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = tier(name).name

    def restore() -> None:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before

    ctx.call_on_close(restore)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            envvar="MOKUS_MODEL",
            show_default="the miniature",
            help="Hub id or folder; only its configs are read, and Qwen/Qwen-Image's are at hand.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="learn, bind or generate; may be repeated.", show_default="all three")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Height and width, pixels.", show_default="the model's", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images drawn at a time.", min=1, max=1024)] = AT_ONCE,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="a GPU if there is one")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Plan for a GPU with so much memory, which need not be here.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --gpu-memory, its name, for seconds: H100, A100, RTX 4090.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a task needs of this machine or another one: memory, FLOPs, seconds, and the memory tier to use.

    Exit code 1 if a task fits in no tier.
    """
    if gpu_memory is not None and not 0 < gpu_memory < 10_000:
        raise MokusError(f"--gpu-memory got {gpu_memory:g}, expected the card's memory in GiB, such as 24.")
    if gpu is not None and gpu_memory is None:
        raise MokusError("--gpu names a card that is not here and goes with --gpu-memory; give its memory in GiB, too.")
    if gpu_memory is not None and device is not None:
        raise MokusError("--gpu-memory plans for a GPU that need not be here, and --device names one; leave one out.")
    for each in task or ():
        if each not in TASKS:
            raise MokusError(f"--task got {each!r}, expected one of {', '.join(TASKS)}.")
    with err.status("reading configs and rehearsing"):
        plans, usual = _plans(model, task or list(TASKS), resolution, batch_size, device, gpu_memory, gpu)
    if as_json:
        print_json([{**plan.as_json(), "usual_tier": usual[plan.task]} for plan in plans])
    else:
        _print(plans, usual)
    if not all(plan.chosen for plan in plans):
        raise typer.Exit(1)


def _plans(
    model: str | None, tasks: list[str], resolution: int | None, batch: int, device: str | None, memory: float | None,
    gpu: str | None,
) -> tuple[list[Plan], dict[str, str | None]]:  # fmt: skip
    """A plan for each task, and by task the tier that a command takes if none is named."""
    from mokus.doctor.machine import other_machine, this_machine
    from mokus.doctor.plan import loaded_for, plan, usual
    from mokus.doctor.shape import Shape
    from mokus.pipeline import device_of

    shape = Shape.of(model)
    machine = this_machine(device_of(device)) if memory is None else other_machine(memory, gpu)
    plans = [plan(shape, task, machine, resolution, batch) for task in tasks]
    taken = {each: usual(shape, machine, loaded=loaded_for(each)) for each in TASKS}
    return plans, {each: tier.name if tier else None for each, tier in taken.items()}


def _print(plans: list[Plan], usual: dict[str, str | None]) -> None:
    from mokus.memory import tier

    first = plans[0].as_json()
    machine, out = first["machine"], stdout()
    parts = ", ".join(f"{name} {n / 1e9:,.2f}" for name, n in first["parameters"].items())
    out.print(f"{first['model']}: billions of parameters: {parts}; {first['disk_gib']:.1f} GiB on disk in bfloat16")
    sizes = ", ".join(
        f"{what} {machine[what]:.1f} GiB" for what in ("gpu", "host", "disk") if machine[what] is not None
    )
    out.print(f"{machine['name']}: {sizes}")
    out.print(_taken("draw or learn", usual["generate"]))
    bound = usual["bind"]
    if bound and "bind" not in tier(bound).tasks:
        out.print(f"{_taken('ask', bound)}; to bind, take --device cpu")
    else:
        out.print(_taken("bind or ask", bound))
    if short := _short_of_host(plans, usual):
        out.print(short)
    for plan in plans:
        _print_plan(plan.as_json(), out)


def _taken(what: str, usual: str | None) -> str:
    if usual is None:
        return f"without --tier, no command that is to {what} runs: nothing fits"
    return f"without --tier, commands that {what} take tier {usual}"


def _short_of_host(plans: list[Plan], usual: dict[str, str | None]) -> str | None:
    """A sentence if the host has too little memory for some of the tasks in the tier that a command takes."""
    from mokus.doctor.machine import GIB

    needs = [each for plan in plans for each in plan.needs if each.tier.name == usual[plan.task]]
    have = plans[0].machine.host
    most = max((each.host for each in needs), default=0.0)
    if have is None or most <= have:
        return None
    return (
        f"warning: that takes about {most / GIB:.1f} GiB of host memory, and there are {have / GIB:.1f} GiB; commands are not "
        "refused for it, but the system may end them: use a machine with more memory, or more swap"
    )


def _print_plan(found: dict[str, Any], out: Any) -> None:
    from mokus.memory import INSTALL

    why = "" if any(each["fits_host"] for each in found["tiers"]) else ", too little host memory"
    verdict = f"tier {found['tier']}" if found["tier"] else f"fits in no tier{why}"
    below = f", next one down {found['next_tier']}" if found["next_tier"] else ""
    out.print(f"\n{found['task']} at {found['resolution']} pixels: {verdict}{below}")
    stages = Table("stage", "on the device", "weights, GiB", "peak, GiB", box=None, pad_edge=False)
    for each in found["stages"]:
        stages.add_row(
            each["stage"], ", ".join(each["resident"]), f"{each['weights_gib']:.2f}", f"{each['peak_gib']:.2f}"
        )
    out.print(stages)
    unit = next(key.removeprefix("tflop_per_") for key in found if key.startswith("tflop_per_"))
    seconds, whole = found[f"seconds_per_{unit}"], found["seconds"]
    took = "; seconds are not known for this card" if seconds is None else f", {_time(seconds)}; in all {_time(whole)}"
    out.print(f"{_tflop(found[f'tflop_per_{unit}'])} for each {unit}{took}")
    tiers = Table("tier", "GPU, GiB", "host, GiB", "", "", box=None, pad_edge=False)
    for (gib, host, lacking), alike in groupby(found["tiers"], key=itemgetter("gpu_gib", "host_gib", "lacks")):
        first, *others = alike
        name = f"{first['tier']} to {others[-1]['tier']}" if others else first["tier"]
        mark = "chosen" if first["tier"] == found["tier"] else "fits" if first["fits"] else "too large"
        mark += f", lacks {lacking}" if lacking else ""
        what = first["what"].partition(";")[0] if others else first["what"]  # behind it: in which they differ elsewhere
        tiers.add_row(name, "" if gib is None else f"{gib:.2f}", f"{host:.1f}", mark, what)
    out.print(tiers)
    if missing := {each["lacks"] for each in found["tiers"] if each["lacks"]}:
        out.print(f"not installed: {', '.join(missing)}; {INSTALL}", markup=False)


def _tflop(tflop: float) -> str:
    return f"{tflop:,.1f} TFLOP" if tflop >= 1 else f"{1000 * tflop:,.1f} GFLOP"


def _time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.1f} {name}"
    return f"about {seconds:.3g} s"
