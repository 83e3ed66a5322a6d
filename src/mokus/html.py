"""Parts of the HTML pages that are reports: nothing in them is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

from PIL import Image

PIXEL_ART = 128  # pixels: images up to this width keep their pixels, larger ones become thumbnails of twice this width

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style>
<main><header><h1>{title}</h1><p>{subtitle}</p></header>
{body}
</main></html>
"""


def section(title: str, note: str, content: str) -> str:
    """A part of a page. The title is text; `note` and `content` are HTML, escaped by whoever made them."""
    about = f"<p class=note>{note}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{about}{content}</section>"


def img(image: Image.Image, kind: str, title: str) -> str:
    """An <img> that carries its own pixels."""
    buffer, hard = BytesIO(), image.width <= PIXEL_ART
    if hard:
        image.save(buffer, "PNG")
    else:
        small = image.convert("RGB")
        small.thumbnail((2 * PIXEL_ART, 2 * PIXEL_ART))
        small.save(buffer, "JPEG", quality=88)
    data = f"data:image/{'png' if hard else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{kind}{" hard" if hard else ""}" alt="{escape(title)}" title="{escape(title)}" src="{data}">'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def loss_curve(losses: Sequence[tuple[int, float]], width: int = 720, height: int = 200) -> str:
    """An SVG of (step, loss): every value, faint, and their exponential mean over about a twentieth of the run."""
    if len(losses) < 2:
        return ""
    last, top = losses[-1][0], max(loss for _, loss in losses) or 1.0
    share = 1 / max(len(losses) / 20, 1)
    mean, smooth = losses[0][1], []
    for step, loss in losses:
        mean += share * (loss - mean)
        smooth.append((step, mean))
    left, right, bottom = 44, width - 10, height - 24

    def line(points: Iterable[tuple[int, float]], kind: str) -> str:
        at = [(left + (right - left) * x / last, bottom - (bottom - 10) * y / top) for x, y in points]
        return f'<polyline class={kind} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'

    return (
        f'<svg class=loss viewBox="0 0 {width} {height}" role=img aria-label="training loss by step">'
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/><line x1="{left}" y1="10" x2="{left}" y2="{bottom}"/>'
        f'<text x="{left - 6}" y="16" text-anchor=end>{top:.2g}</text><text x="{left - 6}" y="{bottom}" text-anchor=end>0</text>'
        f'<text x="{right}" y="{height - 6}" text-anchor=end>step {last}</text>'
        f"{line(losses, 'raw')}{line(smooth, 'mean')}</svg>"
    )
