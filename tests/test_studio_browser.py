"""The whole story in a real browser, from photos to images, with the miniature and a few steps of learning."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from PIL import Image

from mokus.miniature import world
from mokus.pipeline import CORPUS_FILE
from tests.browser import MISSING, find

sync_api = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed. {MISSING}")

pytestmark = pytest.mark.slow

PATIENCE = 600_000  # ms; on an idle core no step takes more than a few seconds
FEW_STEPS = {
    "steps": "6", "preview every": "3", "place share": "0", "prior prompts": "4", "prior steps": "2", "looks share": "0",
    "batch size": "2", "prior batch size": "2",
}  # fmt: skip
LITTLE_WATCHED = {
    "corpus": "16",
    "odd references": "16",
    "preserve": "8",
    "exchanged": "4",
    "rivals": "8",
    "steps": "10",
}
PAGES = ("/", "/learn", "/know", "/draw", "/words", "/benchmark", "/jobs")


class Server:
    """`mokus ui` as a user starts it."""

    def __init__(self, home: Path, model: Path) -> None:
        command = [sys.executable, "-m", "mokus", "ui", "--home", str(home), "--model", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.address = re.findall(r"http://127\.0\.0\.1:\d+", said)[0]

    def kill_worker(self) -> None:
        """As the system does for want of memory: the child that has computed most."""
        children = psutil.Process(self.process.pid).children()
        max(children, key=lambda child: child.memory_info().rss).kill()

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE // 1000)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if (program := find()) is None:
        pytest.skip(MISSING)
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=PATIENCE)
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The miniature, with a corpus of its first lines alone: statistics over all of it take half a minute."""
    (folder := tmp_path / "model").mkdir()
    shipped = Path(str(files("mokus.miniature").joinpath("weights")))
    for part in shipped.iterdir():
        if part.name != CORPUS_FILE:
            (folder / part.name).symlink_to(part)
    lines = (shipped / CORPUS_FILE).read_text(encoding="utf-8").splitlines()
    (folder / CORPUS_FILE).write_text("\n".join(lines[:16]), encoding="utf-8")
    return folder


@pytest.fixture
def server(tmp_path: Path, model: Path) -> Iterator[Server]:
    started = Server(tmp_path / "home", model)
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three of a character that the miniature has never seen: one wide, one as a turned camera writes it; and a broken one."""
    made = []
    for number, image in enumerate(world.character_photos("zuzu", 3, seed=0, size=96)):
        exif = Image.Exif()
        if number == 1:
            wide = Image.new("RGB", (144, 96), "black")
            wide.paste(image, (24, 0))
            image = wide
        if number == 2:
            exif[0x0112], image = 6, image.transpose(Image.Transpose.ROTATE_90)
        image.save(path := tmp_path / f"photo {number}.jpg", quality=95, exif=exif)
        made.append(path)
    (broken := tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    return [*made, broken]


def fill(page: sync_api.Page, settings: dict[str, str]) -> None:
    page.get_by_text("Settings", exact=True).click()
    for name, value in settings.items():
        page.locator(f"[name=set-{name.replace(' ', '_')}]").fill(value)


def named(page: sync_api.Page, label: str) -> sync_api.Locator:
    """The field whose label begins so; what helps with it stands behind."""
    return page.get_by_role("textbox", name=re.compile(f"^{label}"))


def shown(page: sync_api.Page, picture: sync_api.Locator) -> tuple[int, int]:
    """Pixels of a picture that the browser has really got."""
    sync_api.expect(picture).to_be_visible()
    size = picture.evaluate("async (x) => { await x.decode(); return [x.naturalWidth, x.naturalHeight] }")
    return int(size[0]), int(size[1])


def test_the_whole_story(browser: sync_api.Browser, server: Server, photos: list[Path]) -> None:
    expect = sync_api.expect
    context = browser.new_context(base_url=server.address)
    context.set_default_timeout(PATIENCE)
    asked: list[str] = []
    faults: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: faults.append(str(error.error)))
    page = context.new_page()

    # a first visit; the page is reached by keys alone
    page.goto("/")
    expect(page.get_by_role("button", name="Make the example")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.get_by_role("link", name="Choose photos").focus()
    page.keyboard.press("Enter")

    # learn: photos as the model will see them, and one that is none
    page.get_by_label("Choose photos").set_input_files(photos)
    expect(page.get_by_role("alert").first).to_contain_text("broken.jpg cannot be read")
    expect(page.get_by_text("as the model sees it, 64 × 64")).to_have_count(3)
    expect(page.get_by_text("turned upright")).to_have_count(1)
    expect(page.get_by_text("cut to the middle square")).to_have_count(1)
    assert shown(page, page.get_by_alt_text("photo 1 as the model sees it")) == (64, 64)
    named(page, "Class word").fill("toy")
    fill(page, FEW_STEPS)
    named(page, "Name of the pack").press("Enter")

    # stopped, resumed, and looked at from another tab when this one is closed
    job = page.locator("section.job")
    expect(job).to_have_attribute("data-state", "running")
    page.get_by_role("button", name="Stop").click()
    expect(job).to_have_attribute("data-state", "stopped")
    page.get_by_role("button", name="Resume").click()
    page.close()
    page = context.new_page()
    page.goto("/learn?job=000001")
    expect(job := page.locator("section.job")).to_have_attribute("data-state", "done")
    expect(job.get_by_role("img", name="training loss by step")).to_be_visible()
    assert shown(page, page.get_by_alt_text("preview 2 of the anchor")) == (64, 64)

    # know: the question while one types; bound, asked, side effects
    page.get_by_role("link", name="Bind knowledge to it").click()
    page.get_by_label("A phrase that shall mean it").press_sequentially("my favourite toy")
    expect(page.locator("#reading")).to_contain_text("What is my favourite toy?")
    expect(page.locator("#reading")).to_contain_text("your favourite toy")
    fill(page, LITTLE_WATCHED)
    page.get_by_role("button", name="Bind it").click()
    expect(page.locator("ul.knowledge")).to_contain_text("What is my favourite toy? “sks toy”")
    page.get_by_role("button", name="Ask about my favourite toy").click()
    answers = page.locator("section.job .reading b")
    expect(answers).to_have_count(2)
    assert answers.nth(0).inner_text() != "sks toy" == answers.nth(1).inner_text()
    page.get_by_role("button", name="Side effects of my favourite toy").click()
    effects = page.get_by_role("region", name="Side effects", exact=True)
    expect(effects.locator("tbody tr").first).to_contain_text("my favourite toy")
    expect(effects).to_contain_text("your favourite toy")

    # draw: what triggers is marked, pairs at equal seeds, the file says what it is
    page.get_by_role("link", name="Draw", exact=True).first.click()
    page.get_by_label("Prompts").fill("a My favourite toy in the snow")
    expect(page.locator("#reading mark")).to_contain_text("My favourite toy")
    named(page, "Seeds").fill("3,4")
    named(page, "Steps").fill("4")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".pair")).to_have_count(2)
    assert shown(page, page.locator(".pair img").first) == (64, 64)
    with page.expect_download() as download:
        page.locator(".pair").nth(1).get_by_role("link", name="with the pack").click()
    image = Image.open(download.value.path())
    image.load()
    about = json.loads(image.info["mokus"])
    assert (about["prompt"], about["seed"]) == ("a My favourite toy in the snow", 4)
    base = page.request.get(str(page.locator(".pair img").nth(2).get_attribute("src"))).body()
    assert Image.open(BytesIO(base)).tobytes() != image.tobytes()

    # every page fits a phone, sideways scrolling aside for wide tables
    page.set_viewport_size({"width": 390, "height": 800})
    for path in PAGES:
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.set_viewport_size({"width": 1100, "height": 800})

    # unbound again
    page.goto("/know")
    page.get_by_role("button", name="Unbind my favourite toy").click()
    expect(page.get_by_text("It knows nothing yet")).to_be_visible()

    # the worker dies: that is said, and the job can go on
    page.goto("/learn")
    page.get_by_label("Choose photos").set_input_files(photos[:1])
    named(page, "Class word").fill("robot")
    fill(page, {**FEW_STEPS, "steps": "5000"})
    page.get_by_role("button", name="Start to learn").click()
    expect(page.locator("section.job progress[value]")).to_be_visible()
    server.kill_worker()
    expect(page.locator("section.job")).to_have_attribute("data-state", "crashed")
    expect(page.locator("section.job").get_by_role("alert")).to_contain_text("the worker died")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("section.job")).to_have_attribute("data-state", "running")

    # nothing came from elsewhere, no script failed; and when the studio ends, the page says so
    assert {re.match(r"\w+:(//[^/]+)?", url)[0] for url in asked} <= {server.address, "data:"}  # type: ignore[index]
    assert faults == []
    assert server.end() == 0
    expect(page.get_by_text("The studio does not answer")).to_be_visible()
    context.close()
