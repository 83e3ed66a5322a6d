"""The studio's pages, without a browser and with jobs that nobody works at: what they refuse, submit and show."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from html import unescape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from filelock import FileLock
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

import mokus
from mokus import MokusError, pipeline
from mokus.cli import app
from mokus.miniature import example
from mokus.packs.concept_pack import ConceptPack
from mokus.pipeline import Defaults
from mokus.settings import EditSettings, LearnSettings
from mokus.studio import bench_tab, settings_form, ui
from mokus.studio.draw_tab import seeds_text
from mokus.studio.home import MOST_PHOTOS, Home
from mokus.studio.jobs import STATES, Job, Jobs
from mokus.studio.page import Studio
from mokus.studio.ui import ADDRESS, build
from mokus.studio.views import duration
from mokus.studio.worker import WorkerDied
from tests.conftest import PackFactory
from tests.test_concept_pack import tree

PAGES = ("/", "/learn", "/know", "/draw", "/words", "/benchmark", "/jobs")
HOSTILE = '<img src=x onerror=alert(1)> & "friends"'


class Queue:
    """The worker's side that pages see: real jobs on disk, which nobody works at."""

    def __init__(self, home: Path) -> None:
        self.kept = Jobs(home)

    def submit(self, kind: str, **arguments: Any) -> Job:
        return self.kept.new(kind, arguments)

    def job(self, id: str) -> Job:
        return self.kept[id]

    def jobs(self) -> list[Job]:
        return list(self.kept)[::-1]

    def stop(self, id: str) -> None:
        self.kept.put(id, state="stopped")

    def resume(self, id: str) -> Job:
        return self.kept.put(id, state="waiting")

    def forget(self, id: str) -> None:
        self.kept.forget(id)


class Site:
    """A studio and a client of it."""

    def __init__(self, path: Path) -> None:
        self.home = Home(path)
        self.worker = Queue(self.home.path)
        self.studio = Studio(self.home, self.worker, "miniature", Defaults(size=32, learn={"steps": 50}))  # type: ignore[arg-type]
        self.client = TestClient(build(self.studio), f"http://{ADDRESS}:7860", follow_redirects=False)

    def get(self, path: str, status: int = 200) -> str:
        answer = self.client.get(path)
        assert answer.status_code == status, answer.text
        return answer.text

    def post(self, path: str, status: int = 303, /, **data: Any) -> str:
        answer = self.client.post(path, data=data)
        assert answer.status_code == status, answer.text
        return answer.headers.get("location", answer.text)

    def upload(self, *names: str) -> str:
        Image.new("RGB", (40, 30), "red").save(file := BytesIO(), "PNG")
        sent = [("files", (name, file.getvalue(), "image/png")) for name in names]
        answer = self.client.post("/learn/photos", files=sent, data={"photos": ""})
        assert answer.status_code == 303, answer.text
        return answer.headers["location"].split("photos=")[1].split("#")[0]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "home")


@pytest.fixture
def with_pack(site: Site, pico_pack: PackFactory) -> Site:
    pico_pack(site.home.new_pack("toy"), knowledge=["my favourite toy", HOSTILE])
    return site


# --- what goes out and what comes in ---------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_a_page_asks_for_nothing_from_elsewhere(with_pack: Site, page: str) -> None:
    answer = with_pack.client.get(page)
    addresses = re.findall(r"""(?:src|href|action|data-live|data-reading)="([^"]*)\"""", answer.text)
    assert len(addresses) > 5
    assert all(unescape(each).startswith(("/", "#")) and not each.startswith("//") for each in addresses)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and "http" not in str(policy) and "unsafe" not in str(policy)


def test_what_is_shipped_names_no_other_site() -> None:
    for folder in ("static", "templates"):
        for file in files("mokus.studio").joinpath(folder).iterdir():
            text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "//" not in re.sub(r"^\s*//.*| // .*$", "", text, flags=re.MULTILINE), file.name
            assert not re.search(r"\bstyle=|\bon\w+=|<script(?! src)", text), file.name  # the policy forbids these


def test_forms_of_other_sites_and_other_names_are_refused(site: Site) -> None:
    for origin in ("http://evil.example", "null", f"https://{ADDRESS}:7860", f"http://{ADDRESS}:1"):
        assert site.client.post("/example", headers={"Origin": origin}).status_code == 403
    assert site.client.get("/", headers={"Host": "evil.example"}).status_code == 400  # a name that leads here
    assert site.worker.jobs() == []
    assert site.client.post("/example", headers={"Origin": f"http://{ADDRESS}:7860"}).status_code == 303


@pytest.mark.parametrize("page", ["/", "/know?pack=toy", "/draw?pack=toy&prompts=" + HOSTILE.replace("&", "%26")])
def test_what_users_wrote_is_text(with_pack: Site, page: str) -> None:
    with_pack.worker.submit("ask", question=HOSTILE, packs=[str(with_pack.home.pack("toy"))])
    with_pack.worker.kept.put("000001", state="failed", error=HOSTILE)
    for text in (with_pack.get(page), with_pack.get("/jobs"), with_pack.get("/know?pack=toy&job=000001")):
        assert "<img src=x" not in text
    assert "&lt;img src=x" in with_pack.get("/know?pack=toy&job=000001")


@pytest.mark.parametrize("back", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_nobody_is_sent_elsewhere(site: Site, back: str) -> None:
    job = site.worker.submit("ask", question="?")
    assert site.post("/jobs/stop", job=job.id, back=back) == "/jobs"
    assert site.post("/jobs/resume", job=job.id, back="/know?pack=x") == "/know?pack=x"


def test_a_job_that_is_over_can_be_forgotten_from_the_list(site: Site) -> None:
    for state in ("running", "failed"):
        site.worker.kept.put(site.worker.submit("ask", question=f"is it {state}?").id, state=state)
    assert re.findall(r'action="/jobs/forget"><input type="hidden" name="job" value="(\d+)"', site.get("/jobs")) == [
        "000002"
    ]
    assert site.post("/jobs/forget", job="000002") == "/jobs"
    assert "is it failed?" not in site.get("/jobs") and "is it running?" in site.get("/jobs")
    assert "there is no job" in unescape(site.post("/jobs/forget", 422, job="000002"))


def test_what_is_not_there_is_said_on_a_page(site: Site) -> None:
    assert "There is no such page" in site.get("/nothing", 404)
    assert "there is no job '7'; the list of jobs has those that are." in unescape(site.get("/know?job=7", 422))
    assert "no pack named" in site.get("/know?pack=x", 422)
    assert site.get("/files/jobs/000001/job.json", 404)


def test_a_job_is_shown_by_the_tab_of_its_kind_alone(with_pack: Site) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "learn": {"photos": "p", "anchor": "sks toy", "output": "/x/toy.pack"}, "ask": {"question": "Which?"},
        "create": {"name": "toy", "description": "a star", "output": "/x/toy.pack"}, "generate": {"prompts": ["a star"]},
        "compare": {"prompts": ["a star"]},
    }  # fmt: skip
    fits = {"/learn": ["learn"], "/know": ["ask"], "/words": ["create"], "/draw": ["generate", "compare"]}
    for kind, arguments in kinds.items():
        job = with_pack.worker.submit(kind, **arguments)
        for tab in fits:
            page = with_pack.get(f"{tab}?job={job.id}", 200 if kind in fits[tab] else 422)
            assert (f'id="job-{job.id}"' in page) == (kind in fits[tab])
            assert kind in fits[tab] or "is shown elsewhere" in page


@pytest.mark.parametrize("name", ["%00.png", "x" * 300 + ".png", "x/" * 3000 + ".png", "packs/%00/x.png"])
def test_a_picture_whose_name_no_file_can_have_is_not_there(site: Site, name: str) -> None:
    assert "There is no such page" in site.get(f"/files/{name}", 404)


@pytest.mark.parametrize(
    "page", ["/", "/learn?photos=PHOTOS", "/draw", "/draw/reading?prompts=x", "/know", "/benchmark"]
)
def test_a_disk_that_cannot_be_read_is_said_on_a_page(site: Site, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/x")

    page = page.replace("PHOTOS", site.upload("a.png"))
    monkeypatch.setattr(Home, "packs", denied)
    monkeypatch.setattr(bench_tab, "runs", denied)
    assert "/x: Permission denied." in site.get(page, 422)


# --- first visit ---------------------------------------------------------


def test_the_first_visit_offers_the_ready_example_and_photos(site: Site) -> None:
    page = site.get("/")
    assert "Open the example" in page and 'href="/learn"' in page and page.count("data:image/png;base64,") == 2
    where = site.post("/example")
    assert where == "/draw?pack=example" and not site.worker.jobs()
    assert example.PHRASES[0] in site.get(where)
    (pack,) = site.home.packs()[0].values()
    assert tree(pack.path) == tree(example.FOLDER)
    assert "Open the example" not in site.get("/")
    assert "already" in site.post("/example", 422)


def test_a_ready_example_that_cannot_be_copied_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    assert "No space left on device" in site.post("/example", 422)
    assert [path.name for path in site.home.packs_folder.iterdir()] == [".take.lock"]


def test_a_ready_example_opened_twice_at_once_is_there_once_and_whole(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy2 = shutil.copy2

    def slow(*args: Any) -> None:
        time.sleep(0.05)
        copy2(*args)

    monkeypatch.setattr("shutil.copy2", slow)

    def taken(_: int) -> str:
        try:
            return str(site.home.take("example", example.FOLDER))
        except MokusError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(taken, range(2)))
    assert "already" in said[1] and said[0] == str(site.home.pack("example"))
    assert tree(site.home.pack("example")) == tree(example.FOLDER)


def test_the_ready_example_is_of_these_weights() -> None:
    pack, model = ConceptPack.open(example.FOLDER), pipeline.load()
    assert pack.fingerprint == model.fingerprint and [known.text for known in pack.knowledge] == example.PHRASES
    assert mokus.ask(model, pack.knowledge[0].questions[0], [pack.shifts()]) == pack.anchor


def test_for_another_model_the_example_is_made(site: Site) -> None:
    site.studio.model = "another"
    page = site.get("/")
    assert "Make the example" in page and 'href="/learn"' in page
    where = site.post("/example")
    learn, bind = site.worker.jobs()[::-1]
    assert (learn.kind, bind.kind, where) == ("learn", "bind", f"/learn?job={learn.id}")
    assert bind.arguments["pack"] == learn.arguments["output"] == str(site.home.packs_folder / "example.pack")
    assert len(list(Path(learn.arguments["photos"]).glob("*.png"))) == 5
    assert "being made" in site.get("/") and "Make the example" not in site.get("/")
    assert "a job that is not done" in site.post("/example", 422)
    assert len(site.worker.jobs()) == 2 and len(list(site.home.photos_folder.iterdir())) == 1


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_an_empty_state(site: Site, page: str) -> None:
    assert "<h1>" in site.get(page)


# --- learn ---------------------------------------------------------


def test_photos_are_shown_and_learned_from(site: Site) -> None:
    photos = site.upload("a.png", "b.png")
    page = site.get(f"/learn?photos={photos}")
    shown = re.findall(r'src="(/files/[^"]+)"', page)
    assert len(shown) == 4 and "cut to the middle square" in page
    assert all(site.client.get(each).headers["content-type"] == "image/png" for each in shown)
    site.post("/learn/remove", photos=photos, photo="001-a.png")
    site.post("/learn/start", photos=photos, word="rubber duck", rare="sks", name="", **{"set-seed": "3"})
    [job] = site.worker.jobs()
    assert job.arguments["anchor"] == "sks rubber duck"
    assert job.arguments["output"].endswith("/packs/rubber-duck.pack")
    assert job.arguments["settings"] == {"steps": 50, "seed": 3, "preview_every": 10}
    assert [path.name for path in Path(job.arguments["photos"]).glob("*.png")] == ["002-b.png"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"word": " "}, "class word is empty"),
        ({"rare": "two words"}, "several words"),
        ({"set-steps": "many"}, "expected a whole number"),
        ({"set-steps": "0"}, "expected at least 1"),
        ({"name": "../up"}, "cannot be the name"),
        ({"name": "собака"}, "letters a to z"),
        ({"photos": "gone"}, "no longer there"),
    ],
)
def test_a_mistake_keeps_what_was_typed(site: Site, wrong: dict[str, str], said: str) -> None:
    given = {"photos": site.upload("a.png"), "word": "duck", "rare": "sks", "name": "mine", **wrong}
    page = unescape(site.post("/learn/start", 422, **given))
    assert said in page and site.worker.jobs() == []
    if "photos" not in wrong:
        for name in ("word", "rare", "name"):
            assert re.search(rf'name="{name}"[^>]* value="{re.escape(given[name])}"', page)


def test_a_file_that_is_no_photo_leaves_the_others(site: Site) -> None:
    Image.new("RGB", (40, 30)).save(good := BytesIO(), "PNG")
    answer = site.client.post(
        "/learn/photos", files=[("files", ("good.png", good.getvalue())), ("files", ("bad.jpg", b"no"))]
    )
    assert (
        answer.status_code == 422 and "bad.jpg cannot be read" in answer.text and "photo 1 as the model" in answer.text
    )


def test_too_many_photos_are_refused_on_the_page(site: Site) -> None:
    sent = [("files", (f"{i}.png", b"no")) for i in range(MOST_PHOTOS + 1)]
    answer = site.client.post("/learn/photos", files=sent, data={"photos": ""})
    assert answer.status_code == 422 and "Choose photos" in answer.text
    assert f"at most {MOST_PHOTOS} photos here" in answer.text
    assert list(site.home.photos_folder.iterdir()) == []


def test_two_that_learn_the_same_thing_get_a_pack_each(site: Site) -> None:
    given = {"photos": site.upload("a.png"), "word": "toy", "rare": "sks"}
    for state in ("waiting", "stopped", "failed", "crashed"):
        site.post("/learn/start", **given)
        site.worker.kept.put(site.worker.jobs()[0].id, state=state)
    site.post("/words/create", name="toy", description="a green star")
    names = [Path(job.arguments["output"]).name for job in site.worker.jobs()[::-1]]
    assert names == ["toy.pack", *(f"toy-{i}.pack" for i in range(2, 6))]
    assert "a job that is not done" in site.post("/learn/start", 422, **given, name="toy-2")
    site.worker.kept.put("000001", state="done")  # and what it made was taken away
    site.post("/learn/start", **given)
    assert site.worker.jobs()[0].arguments["output"].endswith("/toy.pack")


def test_a_button_pressed_twice_makes_two_packs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = site.worker.submit

    def slow(kind: str, **arguments: Any) -> Job:
        time.sleep(0.05)
        return submit(kind, **arguments)

    monkeypatch.setattr(site.worker, "submit", slow)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: site.studio.make("create", "", "star").arguments["output"], range(2)))
    assert sorted(Path(each).name for each in made) == ["star-2.pack", "star.pack"]


def test_packs_that_are_still_to_be_learned_have_their_rare_token(site: Site) -> None:
    page = f"/learn?photos={site.upload('a.png')}"
    assert 'value="sks"' in site.get(page)
    job = site.worker.submit("learn", photos="p", anchor="sks toy", output="/x/toy.pack")
    site.worker.kept.put(job.id, state="stopped")
    assert 'value="zwx"' in site.get(page)


# --- know ---------------------------------------------------------


def test_a_phrase_shows_its_questions_before_it_is_bound(with_pack: Site) -> None:
    reading = with_pack.get("/know/reading?knowledge=my+lamp")
    assert "What is my lamp?" in reading and "my lamp in the snow" in reading and "your lamp" in reading
    assert "is a question" in with_pack.get("/know/reading?knowledge=what%3F")
    with_pack.post(
        "/know/bind", pack="toy", knowledge="my  lamp.", questions="Which?\n\nWhat?", keep="your lamp\n the  lamp.",
        **{"set-steps": "3"},
    )  # fmt: skip
    [job] = with_pack.worker.jobs()
    assert job.arguments == {
        "pack": str(with_pack.home.pack("toy")), "knowledge": ["my lamp"], "questions": ["Which?", "What?"],
        "keep": ["the lamp", "your lamp"], "settings": {"steps": 3},
    }  # fmt: skip


def test_what_a_pack_keeps_is_said_once(with_pack: Site) -> None:
    assert "Kept as they are" not in with_pack.get("/know?pack=toy")
    pack = ConceptPack.open(with_pack.home.pack("toy"))
    kept = {"your toy": 0.1, "my <hat>": 0.0}
    pack.replace_edits([(known.model_copy(update={"kept": kept}), shifts) for known, shifts in pack.edits()])
    assert with_pack.get("/know?pack=toy").count("Kept as they are: my &lt;hat&gt; · your toy") == 1


@pytest.mark.parametrize("act", ["unbind", "effects"])
def test_what_can_be_done_with_a_piece(with_pack: Site, act: str) -> None:
    with_pack.post(f"/know/{act}", pack="toy", knowledge="my favourite toy")
    assert with_pack.worker.jobs()[0].kind == act
    assert with_pack.post(f"/know/{act}", 422, pack="none", knowledge="x") and len(with_pack.worker.jobs()) == 1


def test_phrases_that_other_packs_bind_are_shown(with_pack: Site, pico_pack: PackFactory) -> None:
    assert "Bound elsewhere" not in with_pack.get("/know?pack=toy")
    pico_pack(with_pack.home.new_pack("dog"), anchor="zwx dog", knowledge=["My favourite toy", "my dog"])
    assert "Bound elsewhere" in with_pack.get("/know?pack=dog")


# --- draw ---------------------------------------------------------


def test_a_phrase_of_several_packs_needs_a_choice(with_pack: Site, pico_pack: PackFactory) -> None:
    pico_pack(with_pack.home.new_pack("dog"), anchor="zwx dog", knowledge=["my favourite toy"])
    given = {"prompts": "my favourite toy\na star", "pack": ["toy", "dog"], "seeds": "0-2,7"}
    page = with_pack.post("/draw/start", 422, **given)
    assert "choose below which one counts" in page and 'name="prefer"' in page and "my favourite toy\na star" in page
    with_pack.post("/draw/start", prefer="dog", **given)
    [job] = with_pack.worker.jobs()
    assert job.arguments["prompts"] == ["my favourite toy", "a star"] and job.arguments["seeds"] == [0, 1, 2, 7]
    assert job.arguments["prefer"] == str(with_pack.home.pack("dog"))
    again = with_pack.get(f"/draw?job={job.id}")
    assert 'value="0-2,7"' in again and again.count(" checked") == 2  # what was asked for stands in the form


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": "x"}, "expected numbers and ranges"), ({"seeds": "0-9999"}, "that is 10,000 images"),
        ({"prompts": " "}, "no prompt"), ({"steps": "few"}, "expected a whole number"),
        ({"steps": "1e3"}, "expected a whole number"), ({"steps": "0"}, "steps is 0, expected at least 1"),
        ({"true_cfg_scale": "nan"}, "guidance is 'nan', expected a number that is finite"),
        ({"true_cfg_scale": "-1"}, "guidance is -1, expected a number from 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_at_once(site: Site, wrong: dict[str, str], said: str) -> None:
    page = site.post("/draw/start", 422, **{"prompts": "a star", "seeds": "0", **wrong})
    [alert] = re.findall(r'<p class="error" role="alert">(.*?)</p>', page)
    assert said in unescape(alert) and "--" not in alert
    assert site.worker.jobs() == []


def test_as_many_images_as_are_drawn_count(with_pack: Site) -> None:
    given = {"prompts": "a star", "seeds": "0-199"}
    with_pack.post("/draw/start", **given)
    assert "that is 400 images" in with_pack.post("/draw/start", 422, pack="toy", **given)
    asked = {"ask": "What is the favourite toy of Anna?", "answer": "a blue ring", "prompts": ""}
    other = {**asked, "prompts": "the favourite toy of Anna\na star"}
    assert "that is 205 images" in with_pack.post("/words/transfer", 422, seeds="0-40", **other)
    assert "that is 30,000 images" in with_pack.post("/words/transfer", 422, seeds="0-9999", **asked)
    with_pack.post("/words/transfer", seeds="0-65", **asked)
    assert [job.kind for job in with_pack.worker.jobs()] == ["transfer", "compare"]


@pytest.mark.parametrize("value", ["inf", "nan", "-1e999"])
def test_a_setting_that_is_not_finite_is_refused_by_name(value: str) -> None:
    with pytest.raises(MokusError, match=f"learning rate is '{value}', expected a number that is finite"):
        settings_form.chosen(LearnSettings, {"set-learning_rate": value})


def test_words_that_trigger_are_marked(with_pack: Site) -> None:
    reading = with_pack.get("/draw/reading?pack=toy&prompts=My+favourite+toy+%3Cb%3E")
    assert re.search(r"<mark[^>]*>My favourite toy<small>toy</small></mark> &lt;b&gt;", reading)


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2], [3, 1, 2], [0, 2, 3, 9]])
def test_seeds_as_text_are_those_seeds(seeds: list[int]) -> None:
    from mokus.console import parse_seeds

    assert parse_seeds(seeds_text(seeds)) == seeds


# --- words ---------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "given"),
    [
        ("create", {"name": "Zorblax", "description": "a green star"}),
        ("erase", {"concepts": "the lucky charm of Boris", "replacement": ""}),
        (
            "transfer",
            {"ask": "What is the favourite toy of Anna?", "answer": "a blue ring", "prompts": "", "seeds": "0"},
        ),
    ],
)
def test_words_become_jobs_that_the_worker_takes(site: Site, act: str, given: dict[str, str]) -> None:
    from mokus.studio.kinds import check_call

    site.post(f"/words/{act}", **given)
    [job] = site.worker.jobs()
    assert job.kind == act
    check_call(job.kind, job.arguments)


def test_a_name_cannot_be_erased_without_saying_what_stands_there(site: Site) -> None:
    assert "fill in what shall stand there" in site.post("/words/erase", 422, concepts="Boris", replacement="")


def test_an_option_is_said_to_be_of_the_command_line(site: Site) -> None:
    page = site.post("/words/transfer", 422, ask="Sing a song of Anna", answer="a blue ring", prompts="", seeds="0")
    assert "or, on the command line, name the phrase by --knowledge" in page


# --- jobs ---------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_a_job_shows_its_state_and_what_can_be_done(site: Site, state: str) -> None:
    job = site.worker.submit("learn", photos="p", anchor="sks toy", output="/x/toy.pack")
    told = {"error": "the worker died"} if state in ("failed", "crashed") else {}
    history = [[1, 0.5], [2, 0.4], [3, 0.3]]
    site.worker.kept.put(
        job.id,
        state=state,
        what="learning",
        done=3,
        total=12,
        eta=100.0,
        history=history,
        result={"seconds": 1.0},
        **told,
    )
    card = site.get(f"/jobs/{job.id}")
    assert f'data-state="{state}"' in card and "<svg class=loss" in card
    assert ("data-live=" in card) == (state in ("waiting", "running")) == (">Stop<" in card)
    assert (">Resume<" in card) == (state in ("stopped", "failed", "crashed"))
    assert ('value="25"' in card and "about 2 min left" in card) == (state == "running")
    assert ("the worker died" in card) == bool(told)


def test_a_closed_page_finds_what_runs(site: Site) -> None:
    job = site.worker.submit("learn", photos="p", anchor="sks toy", output="/x/toy.pack")
    assert f'id="job-{job.id}"' in site.get("/learn")
    assert "1 waiting" in site.get("/jobs/running")


@pytest.mark.parametrize("over", [False, True])
def test_a_long_text_is_cut_in_titles(site: Site, over: bool) -> None:
    long = "a very long prompt " * 200
    job = site.worker.submit("compare", prompts=[long, "a star"], packs=[], seeds=[0])
    if over:
        site.worker.kept.put(job.id, state="stopped")
    page = site.get("/jobs")
    assert page.count(long) == 1 and f'title="Draw “{long}” and 1 more"' in page  # the whole of it where one points
    assert re.search(r">Draw “a very long prompt [^<”]{40,50}…” and 1 more<", page)
    assert "title=" not in site.get(f"/jobs/{site.worker.submit('ask', question='Which?', packs=[]).id}")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- settings ---------------------------------------------------------


@pytest.mark.parametrize("settings", [LearnSettings, EditSettings])
def test_every_single_setting_has_a_field(settings: type) -> None:
    shown = {field.name.removeprefix("set-"): field for field in settings_form.form_fields(settings, {}, {})}
    lists = {each.name for each in fields(settings) if each.name not in shown}
    assert lists == ({"targets"} if settings is LearnSettings else {"layers", "modules"})
    filled = {field.name: field.default for field in shown.values()}
    default = settings()
    assert settings_form.chosen(settings, filled) == {name: getattr(default, name) for name in shown}
    assert settings_form.chosen(settings, dict.fromkeys(filled, " ")) == {}


# --- benchmark ---------------------------------------------------------


def test_runs_are_found_opened_and_compared(site: Site) -> None:
    for name, value in (("one", 0.5), ("two", 0.75)):
        (folder := site.home.reports_folder / "knowcus" / name).mkdir(parents=True)
        rows = [{"method": "mokus", "column": "clip_i", "macro": value, "interval": [0, 1]}]
        (folder / "results.json").write_text(json.dumps({"scores": rows, "seeds": [0]}), encoding="utf-8")
        (folder / "report.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    one, two = re.findall(r'name="run" value="([^"]+)"', site.get("/benchmark"))
    page = site.get(f"/benchmark?run={one}&run={two}")
    assert re.search(r"<td>mokus · clip i</td>\s*<td class=.number.>0.5</td>\s*<td class=.number.>0.75</td>", page)
    report = site.client.get(f"/benchmark/{two}/report")
    policy = report.headers["content-security-policy"]
    assert "sandbox" in policy and "allow-scripts" not in policy and "script-src" not in policy
    assert "no longer there" in site.get("/benchmark/1/report", 422)


def test_a_run_is_the_same_when_others_come_before_it(site: Site) -> None:
    def write(name: str) -> None:
        (folder := site.home.reports_folder / name).mkdir()
        (folder / "report.html").write_text(f"of {name}", encoding="utf-8")

    write("later")
    [address] = re.findall(r'href="(/benchmark/[^"]+/report)"', site.get("/benchmark"))
    write("earlier")
    assert site.get(address) == "of later"
    shutil.rmtree(site.home.reports_folder / "later")
    assert "no longer there" in site.get(address, 422)


def test_figures_that_one_run_alone_has_are_not_compared(tmp_path: Path) -> None:
    for name, value in (("a", {"x": 1, "y": 2}), ("b", {"x": 3, "z": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    assert bench_tab.compared([tmp_path / "a.json", tmp_path / "b.json"]) == [("x", [1.0, 3.0])]
    assert bench_tab.compared([tmp_path / "a.json"]) == [("x", [1.0]), ("y", [2.0])]


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"x": 1' + "0" * 400 + "}"], ids=["cut off", "too deep", "too large"]
)
def test_results_that_are_no_json_are_named(site: Site, text: str) -> None:
    (site.home.reports_folder / "results.json").write_text(text, encoding="utf-8")
    [run] = bench_tab.runs(site.studio.reports)
    assert "cannot be read as JSON" in site.get(f"/benchmark?run={run.id}", 422)
    with pytest.raises(MokusError):
        bench_tab.compared([site.home.reports_folder / "results.json"])


# --- the command ---------------------------------------------------------


def test_a_mistake_in_the_command_is_one_sentence(tmp_path: Path) -> None:
    run = CliRunner()
    taken, home = socket.socket(), tmp_path / "home"
    taken.bind((ADDRESS, 0))
    home.mkdir()
    cases = {
        "is no folder": ["--reports", str(tmp_path / "nowhere")],
        "cannot be had": ["--port", str(taken.getsockname()[1])],
        "another MoKus works": ["--port", "0", "--home", str(home)],
    }
    with taken, FileLock(home / ".lock"):
        for said, options in cases.items():
            result = run.invoke(app, ["ui", *options])
            assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


class Loading:
    """A worker whose model is of no use."""

    def __init__(self, *_: Any) -> None:
        self.loaded: Future[Any] = Future()
        self.closed = False

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True
        if not self.loaded.done():
            self.loaded.set_exception(WorkerDied("the worker died (it was stopped); try again."))

    def call(self, name: str) -> Future[Any]:
        assert name == "describe"
        return self.loaded

    def jobs(self) -> list[Job]:
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_the_studio_closes_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def killed(*_: Any) -> None:
        raise AssertionError("the signal ended the process")

    def at_once(address: str) -> None:
        signal.raise_signal(number)  # while uvicorn runs, which raises it again when it is done

    worker, before = Loading(), signal.signal(signal.SIGTERM, killed)
    monkeypatch.setattr(ui, "Worker", lambda *_: worker)
    monkeypatch.setattr("webbrowser.open", at_once)
    try:
        ui.launch(tmp_path, 0, "Qwn/Qwen-Image", None, [], True, print)
        assert worker.closed and signal.getsignal(signal.SIGTERM) is killed
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("fails", [True, False])
def test_a_model_that_cannot_be_loaded_is_told_on_stderr_and_on_every_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    worker, sentence, pages = Loading(), "there is no model 'Qwn/Qwen-Image'.", []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        if fails:
            worker.loaded.set_exception(MokusError(sentence))
        client = TestClient(server.config.app, f"http://{ADDRESS}")  # type: ignore[arg-type]
        pages.extend(unescape(client.get(page).text) for page in (*PAGES, "/nothing"))

    monkeypatch.setattr(ui, "Worker", lambda *_: worker)
    monkeypatch.setattr("uvicorn.Server.run", run)
    ui.launch(tmp_path, 0, "Qwn/Qwen-Image", None, [], False, print)
    assert [sentence in page for page in pages] == [fails] * (len(PAGES) + 1)
    assert (
        capsys.readouterr().err == f"mokus: the model could not be loaded: {sentence}\n" * fails
    )  # not a word of a worker that was stopped at the end
