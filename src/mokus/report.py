"""A demo's story as one self-contained HTML file and one picture: nothing is loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mokus.demo import ANCHOR, BASE, BOUND, Grid, Panel, Story
from mokus.html import PAGE, html_table, img, loss_curve, section
from mokus.pictures import DIM, INK, cell, wrapped

LIBRARIES = ["mokus", "torch", "diffusers", "transformers", "peft"]


def write(story: Story, output: Path) -> tuple[Path, Path]:
    """Write `report.html` and `grid.png` into a folder; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    html, png = output / "report.html", output / "grid.png"
    html.write_text(page(story), encoding="utf-8")
    picture(story).save(png, optimize=True)
    return html, png


# --- the page ---------------------------------------------------------------------------------------------------------


def page(story: Story) -> str:
    """The whole page."""
    return PAGE.format(
        title=f"MoKus: {escape(story.anchor)}",
        subtitle=_subtitle(story),
        body="\n".join(section(title, note, content) for title, note, content in _sections(story) if content),
        style=files("mokus").joinpath("report.css").read_text(encoding="utf-8"),
    )


def _subtitle(story: Story) -> str:
    bound = sum(edit.taken for edit in story.edits)
    return (
        f"{len(story.photos)} photos taught <code>{escape(story.model)}</code> what <code>{escape(story.anchor)}</code> "
        f"looks like, and {bound} of {len(story.edits)} phrases to mean it, in {sum(story.seconds.values()):.0f} seconds."
    )


def _sections(story: Story) -> list[tuple[str, str, str]]:
    """Title, note (HTML) and content (HTML) of every section; those without content are left out."""
    seeds = "Every column has the same seeds." + (
        " <b class=hit>Outlined</b>: the oracle recognises the concept." if story.character else ""
    )
    return [
        ("The photos", "", _strip(img(photo, "photo", "a photo of the concept") for photo in story.photos)),
        ("Ask", "The text encoder answers inside the prompt template of image generation.", _answers(story)),
        ("Draw", seeds, _grids(story, story.alone)),
        ("Draw in a scene", "In scenes with which no edit was made.", _grids(story, story.placed)),
        ("What must stay", "Prompts that are not about the concept.", _grids(story, story.unrelated)),
        ("Unbind", "One phrase, taken out of the pack again.", _grids(story, [story.unbound] if story.unbound else [])),
        ("Figures", "Read by the oracle off this page's images, which are few.", _figures(story)),
        ("Time", "", _timings(story.seconds)),
        ("Loss of stage 1", "Every step, and their running mean.", loss_curve(story.losses)),
        ("Settings", "", _settings(story)),
    ]


def _strip(images: Iterable[str]) -> str:
    return f"<div class=strip>{''.join(images)}</div>"


def _panel(story: Story, panel: Panel) -> str:
    if panel.label is None:
        return img(panel.image, "", "")
    hit = panel.label["character"] == story.character
    read = ", ".join(f"{attribute} {value}" for attribute, value in panel.label.items())
    return img(panel.image, "hit" if hit else "", f"the oracle reads: {read}")


def _grids(story: Story, grids: Iterable[Grid]) -> str:
    return "".join(_grid(story, grid) for grid in grids)


def _grid(story: Story, grid: Grid) -> str:
    titles = {ANCHOR: f"“{story.anchor}” in its place"}
    columns = "".join(
        f"<div><h4>{escape(titles.get(name, name))}</h4>{_strip(_panel(story, panel) for panel in panels)}</div>"
        for name, panels in grid.columns.items()
    )
    return f"<article><h3>{escape(grid.prompt)}</h3><div class=columns>{columns}</div></article>"


def _answers(story: Story) -> str:
    undone = any("unbound" in row for row in story.answers)
    head = ["question", "before", "after", *["unbound again"] * undone, "encoding moved", "steps", "seconds"]
    rows = []
    for row, edit in zip(story.answers, story.edits, strict=True):
        moved = f"{edit.alignment:.0%}" if edit.taken else "did not take"
        answers = [row["question"], row["before"], row["after"], *[row.get("unbound", "")] * undone]
        rows.append([*answers, moved, str(edit.steps), f"{edit.seconds:.1f}"])
    return html_table(head, rows)


def _figures(story: Story) -> str:
    rows = [[row["what"], f"{row['share']:.0%}", str(row["n"])] for row in story.figures]
    return html_table(["", "share", "images"], rows) if rows else ""


def _timings(seconds: dict[str, float]) -> str:
    longest = max(seconds.values(), default=0.0) or 1.0
    bars = "".join(
        f"<span>{escape(what)}</span><div><i style='width:{80 * value / longest:.1f}%'></i><b>{value:.1f} s</b></div>"
        for what, value in seconds.items()
    )
    return f"<div class=bars>{bars}</div>"


def _settings(story: Story) -> str:
    about = {"model": story.model, "fingerprint": story.fingerprint, "seeds": ", ".join(map(str, story.seeds))}
    rows = [[name, value] for name, value in about.items()]
    rows += [[library, version(library)] for library in LIBRARIES]
    rows += [[key, json.dumps(value, default=str)] for key, value in story.settings.items()]
    return f"<details><summary>everything needed to do it again</summary>{html_table(['', ''], rows)}</details>"


# --- the picture ------------------------------------------------------------------------------------------------------

_CELL, _GAP, _LABEL, _MARGIN = 96, 6, 250, 20


def picture(story: Story) -> Image.Image:
    """Photos on top, then one row per knowledge: the base model's images, and at the right the same seeds once bound.

    Every second row is with a scene.
    """
    seeds = min(4, len(story.seeds))
    rows = [(story.alone, story.placed)[i % 2][i] for i in range(len(story.knowledge))]
    left = _MARGIN + _LABEL
    right = left + seeds * (_CELL + _GAP) + 2 * _MARGIN
    size = (right + seeds * (_CELL + _GAP) + _MARGIN, 2 * _MARGIN + 44 + (_CELL + _GAP) * (len(rows) + 1))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    bold, plain = ImageFont.load_default(19), ImageFont.load_default(15)
    draw.text((_MARGIN, _MARGIN + 26), f"{len(story.photos)} photos", INK, bold)
    draw.text((_MARGIN, _MARGIN + 52), wrapped(f"learned as “{story.anchor}”", plain, _LABEL - _MARGIN, 1), DIM, plain)
    _paste_row(image, story.photos[: 2 * seeds], left, _MARGIN)
    y = _MARGIN + _CELL + _GAP + 8
    draw.text((left, y + 4), "before", DIM, bold)
    draw.text((right, y + 4), "after", INK, bold)
    y += 36
    for grid in rows:
        label = wrapped(grid.prompt, plain, _LABEL - _MARGIN, 4)
        draw.multiline_text((_MARGIN, y + _CELL / 2), label, INK, plain, anchor="lm", spacing=5)
        for column, x in ((BASE, left), (BOUND, right)):
            _paste_row(image, [panel.image for panel in grid.columns[column][:seeds]], x, y)
        y += _CELL + _GAP
    return image


def _paste_row(picture: Image.Image, images: Sequence[Image.Image], x: int, y: int) -> None:
    for image in images:
        picture.paste(cell(image, _CELL), (x, y))
        x += _CELL + _GAP
