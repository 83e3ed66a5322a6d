"""Pictures made of many images: cells in rows, with words beside them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL, MARGIN, MOST = 72, 4, 210, 14, 4  # pixels, but for the seeds at most
INK, DIM = "#1d2330", "#667085"
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def png_of(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG."""
    image.convert("RGB").save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def cell(image: Image.Image, side: int) -> Image.Image:
    """As a square of this many pixels; small ones are enlarged without inventing anything."""
    kind = Image.Resampling.NEAREST if image.width <= side else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((side, side), kind)


def wrapped(text: str, font: Font, width: float, most: int) -> str:
    """The text in lines of this many pixels; what goes beyond `most` lines is cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines) if len(lines) <= most else "\n".join(lines[:most]) + " ..."


def grid(rows: Sequence[tuple[str, dict[str, list[Image.Image]]]]) -> Image.Image:
    """One picture of labels and, beside each, its images by column: RGB. Columns are named once, on top."""
    names = list(dict.fromkeys(name for _, columns in rows for name in columns))
    seeds = min(MOST, max((len(images) for _, columns in rows for images in columns.values()), default=1))
    width = seeds * (CELL + GAP) + MARGIN
    picture = Image.new(
        "RGB", (2 * MARGIN + LABEL + len(names) * width, 2 * MARGIN + 26 + len(rows) * (CELL + GAP)), "white"
    )
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, name in enumerate(names):
        draw.text((MARGIN + LABEL + i * width, MARGIN), name, INK, font)
    for k, (label, columns) in enumerate(rows):
        y = MARGIN + 26 + k * (CELL + GAP)
        words = wrapped(label, font, LABEL - MARGIN, 4)
        draw.multiline_text((MARGIN, y + CELL / 2), words, DIM, font, anchor="lm", spacing=4)
        for i, name in enumerate(names):
            for j, image in enumerate(columns.get(name, [])[:seeds]):
                picture.paste(cell(image, CELL), (MARGIN + LABEL + i * width + j * (CELL + GAP), y))
    return picture
