"""The demo's story on the pico model, and its report: self-contained, safe, complete."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mokus import demo, report
from mokus import html as page_parts
from mokus.checks import ask
from mokus.cli import app
from mokus.errors import MokusError
from mokus.miniature import oracle, world
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Defaults, Model

from .conftest import SIZE, STEPS, PackFactory

SEEDS = (0, 3)
LEARN = {"steps": 4, "rank": 2, "alpha": 2.0, "prior_prompts": 4, "prior_steps": 2}
EDIT = {
    "layers": [1, 2],
    "modules": ["mlp.down_proj"],
    "steps": 1,
    "corpus": 20,
    "odd_references": 8,
    "preserve": 8,
    "near_misses": 2,
    "exchanged": 4,
    "rivals": 2,
    "answer_weight": 0.0,
    "least_alignment": 0.0,
}
READ = {"colour": "red", "shape": "star", "scene": "on the beach", "style": "plain", "character": demo.CHARACTER}


class Judge:
    """An oracle that sees the concept on the beach everywhere."""

    def read(self, images: list[Image.Image]) -> list[dict[str, str]]:
        return [READ] * len(images)


@pytest.fixture(scope="module")
def model(pico: Model) -> Model:
    return replace(pico, defaults=Defaults(size=SIZE, steps=STEPS, learn=LEARN, edit=EDIT))


@pytest.fixture(scope="module")
def told(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Story, Path]:
    """The story of a rendered character, and where it was written."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "load", Judge)
        story = demo.run(model, output, seeds=SEEDS)
    report.write(story, output)
    return story, output


class Page(HTMLParser):
    """What a browser would make of the report: its tags, its text, and all that it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)
        self.loads += re.findall(r"url\(\s*['\"]?([^'\")]*)", html) + re.findall(r"@import\s+(\S+)", html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "poster", "xlink:href")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")], "a script in an attribute"

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(page: Page) -> list[Image.Image]:
    return [Image.open(BytesIO(base64.b64decode(load.split(",", 1)[1]))) for load in page.loads]


def test_the_story_is_complete(told: tuple[demo.Story, Path]) -> None:
    story, output = told
    assert story.knowledge == [text.format(c="toy") for text in demo.KNOWLEDGE] and len(story.knowledge) == 5
    assert [edit.knowledge for edit in story.edits] == story.knowledge
    assert [grid.prompt for grid in story.alone] == story.knowledge
    assert [grid.prompt for grid in story.placed] == [
        f"{t} {s}" for t, s in zip(story.knowledge, demo.SCENES, strict=True)
    ]
    for grid in story.alone + story.placed:
        assert list(grid.columns) == [demo.BASE, demo.LEARNED, demo.BOUND, demo.ANCHOR]
    for grid in story.unrelated:
        assert list(grid.columns) == [demo.BASE, demo.LEARNED, demo.BOUND]
    assert all(len(panels) == len(SEEDS) for grid in story.alone + story.unrelated for panels in grid.columns.values())
    assert len(story.losses) == LEARN["steps"]
    assert {"learning the looks (stage 1)", "binding the knowledge (stage 2)", "drawing"} < story.seconds.keys()
    assert len(list((output / "photos").glob("*.png"))) == demo.PHOTOS


def test_one_piece_is_unbound_again(model: Model, told: tuple[demo.Story, Path]) -> None:
    story, output = told
    assert story.unbound is not None
    bound = [known.text for known in ConceptPack.open(output / "pack").knowledge]
    assert bound == [text for edit in story.edits if edit.taken and (text := edit.knowledge) != story.unbound.prompt]
    assert list(story.unbound.columns) == [demo.BOUND, demo.UNDONE]
    answers = {row["question"]: row for row in story.answers}
    assert [question for question, row in answers.items() if "unbound" in row] == [f"What is {story.unbound.prompt}?"]
    row = answers[f"What is {story.unbound.prompt}?"]
    left = ConceptPack.open(output / "pack").shifts()  # the others are still bound
    assert row["unbound"] == ask(model, f"What is {story.unbound.prompt}?", [left]) != row["after"]
    assert row["before"] == ask(model, f"What is {story.unbound.prompt}?")


def test_the_figures_count_images(told: tuple[demo.Story, Path]) -> None:
    story, _ = told
    figures = {row["what"]: (row["share"], row["n"]) for row in story.figures}
    assert figures["the knowledge alone draws the concept"] == (1.0, 5 * len(SEEDS))
    assert figures["... and the scene"] == (0.2, 5 * len(SEEDS))  # one of five asks for the beach
    assert figures["not yet bound: the same prompts draw it (should not)"] == (1.0, 10 * len(SEEDS))
    assert figures["described prompts keep all labels when knowledge is bound"] == (1.0, 3 * len(SEEDS))


def test_the_scenes_are_not_those_of_the_edits() -> None:
    from mokus.knowledge import CHECK_FORMS, IMAGE_FORMS

    assert not [scene for scene in demo.SCENES for form in (*IMAGE_FORMS, *CHECK_FORMS) if scene in form]
    assert demo.CHARACTER in world.HELD_OUT_CHARACTERS


def test_the_report_is_self_contained(told: tuple[demo.Story, Path]) -> None:
    story, output = told
    html = (output / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(load.startswith("data:image/") for load in page.loads)
    assert not re.search(r"(https?:)?//", re.sub(r"base64,[^\"]*", "", html))
    assert 'name="viewport"' in html
    columns = [grid.columns for grid in [*story.alone, *story.placed, *story.unrelated, story.unbound] if grid]
    assert len(pictures(page)) == demo.PHOTOS + sum(len(panels) for each in columns for panels in each.values())
    assert all(picture.size == (SIZE, SIZE) for picture in pictures(page))
    for title in (
        "The photos",
        "Ask",
        "Draw",
        "What must stay",
        "Unbind",
        "Figures",
        "Time",
        "Loss of stage 1",
        "Settings",
    ):
        assert title in page.text


def test_the_picture_is_there(told: tuple[demo.Story, Path]) -> None:
    story, output = told
    with Image.open(output / "grid.png") as picture:
        assert picture.width > 600 and picture.height > len(story.knowledge) * 90
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


def test_what_users_write_is_text(told: tuple[demo.Story, Path], tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script><img src=http://evil onerror=1> & \"my\" toy's"
    story = replace(told[0], anchor=f"sks {nasty}", model=nasty, settings={nasty: nasty})
    story.alone = [replace(grid, prompt=nasty) for grid in story.alone]
    story.answers = [{"question": nasty, "before": nasty, "after": nasty} for _ in story.edits]
    report.write(story, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and all(load.startswith("data:") for load in page.loads)
    assert page.text.count(nasty) >= 3 + len(story.alone) + 3 * len(story.edits)


def test_what_did_not_take_is_said(told: tuple[demo.Story, Path]) -> None:
    story = replace(told[0], edits=[replace(edit, taken=False) for edit in told[0].edits], unbound=None)
    page = Page(report.page(story))
    assert page.text.count("did not take") == 5 and "0 of 5 phrases" in page.text and "Unbind" not in page.text


@pytest.mark.exhaustive
def test_own_photos_and_knowledge(model: Model, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (200, 150), "teal").save(tmp_path / "photos" / "a.jpg")
    knowledge = ["the {one} I love.", "the {one} I love", "  his  dog "]
    story = demo.run(model, tmp_path / "out", tmp_path / "photos", "sks dog", knowledge, [0])
    assert story.knowledge == ["the {one} I love", "his dog"]
    assert story.figures == [] and story.character is None and not (tmp_path / "out" / "photos").exists()
    html, png = report.write(story, tmp_path / "out")
    assert "oracle" not in Page(html.read_text(encoding="utf-8")).text and png.is_file()


def test_the_class_word_of_the_anchor_is_in_the_knowledge(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(demo._Demo, "run", lambda self, photos: seen.update(knowledge=self.story.knowledge))
    demo.run(model, Path("unused"), anchor="sks dog")
    assert seen["knowledge"][0] == "my favourite dog"


def test_what_is_not_of_a_demo_is_not_replaced(
    model: Model, pico_pack: PackFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Path | None] = []
    monkeypatch.setattr(demo._Demo, "run", lambda self, photos: runs.append(photos))
    before = pico_pack(tmp_path / "pack").digest
    for photos in (None, tmp_path / "mine"):
        with pytest.raises(MokusError, match="pack exists and is not of an earlier demo; name another folder"):
            demo.check_place(tmp_path, photos)
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 2 and "pack exists and is not of an earlier demo" in result.stderr
    with pytest.raises(MokusError, match="not of an earlier demo"):
        demo.run(model, tmp_path)
    assert ConceptPack.open(tmp_path / "pack").digest == before and not runs
    (tmp_path / "report.html").write_text("of a benchmark, which writes one, too")
    with pytest.raises(MokusError, match="not of an earlier demo"):
        demo.run(model, tmp_path)
    (tmp_path / demo.BEGUN).write_text("an earlier demo's")
    demo.run(model, tmp_path)
    assert runs == [None]


def test_large_photos_become_thumbnails() -> None:
    image = Image.effect_noise((1024, 1024), 60)
    assert len(page_parts.img(image, "", "")) < 200_000
    assert page_parts.loss_curve([]) == "" and "<svg" in page_parts.loss_curve([(1, 0.0), (2, 0.0)])
