"""A demo's story as one self-contained HTML file and one picture: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mokus.demo import ANCHOR, BASE, BOUND, Grid, Panel, Story

LIBRARIES = ["mokus", "torch", "diffusers", "transformers", "peft"]
PIXEL_ART = (
    128  # images up to this width are shown with hard pixels, larger ones as thumbnails of twice this width
)


def write(story: Story, output: Path) -> Path:
    """Write `report.html` and `grid.png` into a folder; returns the path of the former."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.html"
    path.write_text(page(story), encoding="utf-8")
    grid_picture(story).save(output / "grid.png", optimize=True)
    return path


def page(story: Story) -> str:
    """The whole page."""
    sections = [
        _section("The photos", f"<div class=strip>{''.join(_image(photo, 'photo') for photo in story.photos)}</div>"),
        _section("Ask", _answers(story), "The text encoder answers inside the prompt template of image generation, "
                 "before and after the knowledge was bound."),
        _section("Draw", "".join(_grid(story, grid) for grid in story.grids), _legend(story)),
        _section("What must stay", "".join(_grid(story, grid) for grid in story.unrelated),
                 "Prompts that have nothing to do with the concept."),
    ]  # fmt: skip
    if story.unbound:
        sections.append(
            _section(
                "Unbind", _grid(story, story.unbound), "The last knowledge, taken out of the pack again."
            )
        )
    if story.figures:
        sections.append(_section("Figures", _figures(story), "Read by an oracle off the images of this page, which are few. "
                                 "<code>python benchmarks/main_job.py</code> measures many characters and seeds."))  # fmt: skip
    sections.append(_section("Time", _timings(story.seconds)))
    if len(story.losses) > 1:
        sections.append(
            _section("Loss of stage 1", loss_curve(story.losses), "Every step, and their running mean.")
        )
    sections.append(_section("Settings", _settings(story)))
    bound = sum(edit.taken for edit in story.edits)
    return _PAGE.format(
        title=f"MoKus: {escape(story.anchor)}",
        subtitle=f"{len(story.photos)} photos and {len(story.knowledge)} phrases taught <code>{escape(story.model)}</code> a concept it "
        f"had never seen; {bound} of the phrases now mean it. {sum(story.seconds.values()):.0f} seconds in all.",
        body="\n".join(sections),
        style=files("mokus").joinpath("report.css").read_text(encoding="utf-8"),
    )


# --- parts of the page ---------------------------------------------------------


def _section(title: str, content: str, note: str = "") -> str:
    return (
        f"<section><h2>{escape(title)}</h2>{f'<p class=note>{note}</p>' if note else ''}{content}</section>"
    )


def _image(image: Image.Image, kind: str = "", title: str = "") -> str:
    """An <img> that carries its own pixels."""
    hard = image.width <= PIXEL_ART
    buffer = BytesIO()
    if hard:
        image.save(buffer, "PNG")
    else:
        small = image.convert("RGB")
        small.thumbnail((2 * PIXEL_ART, 2 * PIXEL_ART))
        small.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    classes = f"{kind} {'hard' if hard else ''}".strip()
    return (
        f'<img class="{classes}" title="{escape(title)}" alt="{escape(title)}" '
        f'src="data:image/{"png" if hard else "jpeg"};base64,{data}">'
    )


def _panel(story: Story, panel: Panel) -> str:
    if panel.label is None:
        return _image(panel.image)
    hit = panel.label["character"] == story.character
    return _image(
        panel.image,
        "hit" if hit else "",
        "the oracle reads: " + ", ".join(f"{k} {v}" for k, v in panel.label.items()),
    )


def _grid(story: Story, grid: Grid) -> str:
    columns = "".join(
        f"<div class=column><h4>{escape(_title(story, name))}</h4><div class=strip>"
        f"{''.join(_panel(story, panel) for panel in panels)}</div></div>"
        for name, panels in grid.columns.items()
    )
    return f"<article><h3>{escape(grid.prompt)}</h3><div class=columns>{columns}</div></article>"


def _title(story: Story, column: str) -> str:
    return f"“{story.anchor}” instead" if column == ANCHOR else column


def _legend(story: Story) -> str:
    note = "Every column has the same seeds."
    return note + (
        " <b class=hit>Outlined</b>: the oracle recognises the concept." if story.character else ""
    )


def _answers(story: Story) -> str:
    undone = any("unbound" in row for row in story.answers)
    head = [
        "question",
        "before",
        "after",
        *(["unbound again"] if undone else []),
        "encoding moved",
        "steps",
        "seconds",
    ]
    rows = []
    for row, edit in zip(story.answers, story.edits, strict=True):
        cells = [row["question"], row["before"], row["after"], *([row.get("unbound", "")] if undone else [])]
        cells += [
            f"{edit.alignment:.2f}" if edit.taken else "did not take",
            str(edit.steps),
            f"{edit.seconds:.1f}",
        ]
        rows.append(cells)
    return _table(head, rows)


def _figures(story: Story) -> str:
    return _table(
        ["", "share", "images"],
        [[row["what"], f"{row['share']:.0%}", str(row["n"])] for row in story.figures],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _timings(seconds: dict[str, float]) -> str:
    longest = max(seconds.values(), default=1.0) or 1.0
    return "".join(
        f"<div class=bar><span>{escape(what)}</span><i style='width:{45 * value / longest:.1f}%'></i><b>{value:.1f} s</b></div>"
        for what, value in seconds.items()
    )


def _settings(story: Story) -> str:
    rows = [
        ["model", story.model],
        ["fingerprint", story.fingerprint],
        ["seeds", ", ".join(map(str, story.seeds))],
    ]
    rows += [[library, version(library)] for library in LIBRARIES]
    rows += [[key, json.dumps(value, default=str)] for key, value in story.settings.items()]
    return f"<details><summary>everything needed to do it again</summary>{_table(['', ''], rows)}</details>"


def loss_curve(losses: Sequence[tuple[int, float]], width: int = 720, height: int = 200) -> str:
    """An SVG of (step, loss): every value, faint, and their exponential mean over about a twentieth of the run."""
    last, top = losses[-1][0], max(loss for _, loss in losses) or 1.0
    keep = 1 - 1 / max(len(losses) / 20, 1)
    mean, smooth = losses[0][1], []
    for step, loss in losses:
        mean = keep * mean + (1 - keep) * loss
        smooth.append((step, mean))

    def line(points: Iterable[tuple[int, float]], kind: str) -> str:
        path = " ".join(
            f"{44 + (width - 54) * x / last:.1f},{height - 24 - (height - 34) * y / top:.1f}"
            for x, y in points
        )
        return f'<polyline class="{kind}" points="{path}"/>'

    return (
        f'<svg class=loss viewBox="0 0 {width} {height}" role="img" aria-label="training loss by step">'
        f'<line x1="44" y1="{height - 24}" x2="{width - 10}" y2="{height - 24}"/><line x1="44" y1="10" x2="44" y2="{height - 24}"/>'
        f'<text x="38" y="16" text-anchor="end">{top:.2g}</text><text x="38" y="{height - 22}" text-anchor="end">0</text>'
        f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">step {last}</text>'
        f"{line(losses, 'raw')}{line(smooth, 'mean')}</svg>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style>
<main><header><h1>{title}</h1><p>{subtitle}</p></header>
{body}
</main></html>
"""


# --- the picture ---------------------------------------------------------

_CELL, _GAP, _LABEL, _MARGIN = 96, 6, 250, 20


def grid_picture(story: Story) -> Image.Image:
    """Photos on top, then one row per knowledge: the base model's images at the left, the same seeds once bound at the right."""
    seeds = min(4, len(story.seeds))
    rows = [
        story.grids[2 * i + i % 2] for i in range(len(story.knowledge))
    ]  # alone, with a scene, alone, ...
    width = 2 * _MARGIN + _LABEL + 2 * seeds * (_CELL + _GAP) + 2 * _MARGIN
    picture = Image.new("RGB", (width, 2 * _MARGIN + (_CELL + _GAP) * (len(rows) + 1) + 44), "white")
    draw = ImageDraw.Draw(picture)
    bold, plain = ImageFont.load_default(19), ImageFont.load_default(15)
    left = _MARGIN + _LABEL
    right = left + seeds * (_CELL + _GAP) + 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN + 26), f"{len(story.photos)} photos", "#1d2330", bold)
    draw.text((_MARGIN, _MARGIN + 52), f"learned as “{story.anchor}”", "#667085", plain)
    _paste_row(picture, story.photos[: 2 * seeds], left, _MARGIN)
    y = _MARGIN + _CELL + _GAP + 8
    draw.text((left, y + 4), "before", "#667085", bold)
    draw.text((right, y + 4), "after", "#1d2330", bold)
    y += 36
    for grid in rows:
        _paste_row(picture, [panel.image for panel in grid.columns[BASE][:seeds]], left, y)
        _paste_row(picture, [panel.image for panel in grid.columns[BOUND][:seeds]], right, y)
        draw.multiline_text(
            (_MARGIN, y + _CELL / 2), _wrapped(grid.prompt, plain), "#1d2330", plain, anchor="lm", spacing=5
        )
        y += _CELL + _GAP
    return picture


def _paste_row(picture: Image.Image, images: Sequence[Image.Image], x: int, y: int) -> None:
    for image in images:
        filter_ = Image.Resampling.NEAREST if image.width <= _CELL else Image.Resampling.LANCZOS
        picture.paste(image.convert("RGB").resize((_CELL, _CELL), filter_), (x, y))
        x += _CELL + _GAP


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _LABEL - _MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
