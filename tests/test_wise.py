"""`mokus bench wise`: what is read, asked, counted and kept, whatever the data, the judge and the network do."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mokus import pipeline
from mokus.bench.knowcusbench.plan import image_file
from mokus.bench.wise import knowledge, miniature_suite, protocol, report, run, score
from mokus.bench.wise.entries import Entries, Entry, load
from mokus.bench.wise.judge import (
    OUTAGE,
    Judge,
    Judgement,
    JudgeSettings,
    Question,
    judgement_file,
    questions,
    read_judgement,
    retry_after,
    scored,
)
from mokus.bench.wise.run import Runner, edit_records, make_plan, read_plan, write_plan
from mokus.cli import app
from mokus.errors import MokusError
from mokus.miniature import judge as oracle_judge
from mokus.miniature import world
from mokus.miniature.world import Picture, Subject
from mokus.pipeline import Model
from mokus.settings import EditSettings

from .test_cli import DEFAULTS
from .test_demo import Page
from .test_knowcus_run import batches_fail

ROWS: list[dict[str, Any]] = [
    {
        "prompt_id": i, "Prompt": prompt, "Explanation": explanation, "Category": "Cultural knowledge", "Subcategory": "Toys",
        **({"Control": True} if control else {}),
    }
    for i, (prompt, explanation, control) in enumerate([
        ("the toy of Ada in the city", "This refers to a red star in the city.", False),
        ("a photo of what Ben lost", "It is a blue ring, which he never found.", False),
        ("the pride of our shelf", "The image should show a green cube.", False),
        ("a pink heart at night", "This is a pink heart at night.", True),
    ], start=1)
]  # fmt: skip
GOOD = {"consistency": 2, "realism": 1, "aesthetic": 0}


def written(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


# --- entries ----------------------------------------------------------------------------------------------------------


def test_both_releases_are_read_from_a_file_a_folder_and_a_clone(tmp_path: Path) -> None:
    legacy = written(
        tmp_path / "clone" / "WISE_legacy" / "data" / "natural_science.json", [{**ROWS[0], "prompt_id": 801}]
    )
    verified = written(
        tmp_path / "clone" / "data_verified" / "natural_science_verified.json", [{**ROWS[0], "prompt_id": 801}]
    )
    written(tmp_path / "clone" / "data_verified" / "merge.json", [{**ROWS[0], "prompt_id": 801}])  # the same once more
    assert load(legacy).version == "legacy" and load(verified).version == "verified"
    assert load(legacy.parent).entries == load(tmp_path / "clone", "legacy").entries
    assert load(tmp_path / "clone", "verified").version == "verified"
    with pytest.raises(MokusError, match=r"both releases.*--data"):
        load(tmp_path / "clone")
    entry = load(legacy).entries[0]
    assert (entry.prompt, entry.explanation, entry.category) == tuple(
        ROWS[0][k] for k in ("Prompt", "Explanation", "Category")
    )


@pytest.mark.parametrize(
    ("category", "prompt_id", "version", "field"),
    [
        ("Cultural knowledge", 900, "legacy", "culture"), ("Horizontal time", 3, "legacy", "time"),
        ("Physics", 1, "legacy", "physics"),
        ("Spatio-temporal reasoning", 567, "legacy", "time"), ("Spatio-temporal reasoning", 568, "legacy", "space"),
        ("Spatio-temporal reasoning", 520, "verified", "time"), ("Spatio-temporal reasoning", 521, "verified", "space"),
        ("", 1000, "verified", "chemistry"), ("", 1001, "verified", ""),
    ],
)  # fmt: skip
def test_the_six_fields_are_found_by_word_or_by_number(
    tmp_path: Path, category: str, prompt_id: int, version: str, field: str
) -> None:
    row = {**ROWS[0], "Category": category, "Subcategory": "", "prompt_id": prompt_id}
    name = f"natural_science{'_verified' * (version == 'verified')}.json"
    assert load(written(tmp_path / name, [row])).entries[0].field == field


def test_a_file_of_another_name_is_not_sorted_by_numbers(tmp_path: Path) -> None:
    assert load(written(tmp_path / "mine.json", [{**ROWS[0], "Category": "People"}])).entries[0].field == ""


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("{", "is no JSON"), ({"a": 1}, "holds a dict, expected a JSON list"), ([], "holds no entries"),
        ([3], "entry 1 is a int"),
        ([ROWS[0], {"prompt_id": 7, "Prompt": "x"}], r"bad.json, entry 2 \(prompt_id 7\): Explanation: field required"),
        ([{**ROWS[0], "Prompt": "  "}], "Prompt: string should have at least 1"),
        ([ROWS[0], ROWS[0]], "entry 2: prompt_id 1 is that of"),
        ([{**ROWS[0], "prompt_id": "one"}], "prompt_id: .*integer"), ([{} for _ in range(9)], "and 22 more"),
        ("[" * 100_000, "is no JSON"),
    ],
)  # fmt: skip
def test_faults_of_the_data_are_told_by_file_and_entry(tmp_path: Path, rows: Any, said: str) -> None:
    with pytest.raises(MokusError, match=said):
        load(written(tmp_path / "bad.json", rows))


def test_a_path_that_is_not_there_or_holds_no_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(MokusError, match="is not there"):
        load(tmp_path / "none")
    with pytest.raises(MokusError, match="has no JSON data"):
        load(tmp_path)
    with pytest.raises(MokusError, match="is no JSON"):
        (tmp_path / "latin.json").write_bytes('["caf\xe9"]'.encode("latin-1"))
        load(tmp_path / "latin.json")


def test_some_of_the_entries(tmp_path: Path) -> None:
    whole = load(written(tmp_path / "some.json", ROWS))
    assert [e.prompt_id for e in whole.some(limit=2).entries] == [1, 2]
    assert [e.control for e in whole.some(control_every=2).entries] == [False, True, False, True]
    assert len(whole.some(categories=["toys"]).entries) == 4 == len(whole.some(categories=["culture"]).entries)
    with pytest.raises(MokusError, match=r"no category 'chess', expected some of .*Toys"):
        whole.some(categories=["Chess"])
    with pytest.raises(MokusError, match="leaves no entry to edit"):
        whole.some(control_every=1)


# --- knowledge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "explanation", "phrase", "answer"),
    [
        ("the toy of Ada in the city", "This refers to a red star in the city.", "the toy of Ada", "a red star"),
        ("What Ben lost", "It is a blue ring, which he never found. It was dear.", "What Ben lost", "a blue ring"),
        ("a photo of the boat", "The image should show the lucky charm of Leo, a cube.", "the boat", "the lucky charm of Leo"),
        ("Holiday food", "Mooncakes are round pastries with a filling.", "Holiday food", "Mooncakes"),
        ("A gift for mothers", "The model should generate an image of a carnation (pink).", "A gift for mothers", "a carnation"),
        ("the ocean at night", "It's the ocean: dark and calm.", "the ocean at night", "the ocean"),
        ("at night", "at night", "at night", "at night"),
    ],
)  # fmt: skip
def test_templates(prompt: str, explanation: str, phrase: str, answer: str) -> None:
    assert knowledge.by_templates(prompt, explanation) == (phrase, answer)


def test_knowledge_is_made_once_and_may_be_corrected_by_hand(tmp_path: Path, pico: Model) -> None:
    entries = load(written(tmp_path / "data.json", ROWS)).entries
    made = knowledge.made(pico, entries, "templates", tmp_path)
    assert [made[i].answer for i in made] == ["a red star", "a blue ring", "a green cube"]  # no control
    assert made[1].questions[0] == "What is the toy of Ada?"
    file = tmp_path / knowledge.FILE
    rows = json.loads(file.read_text())
    rows[0]["answer"] = "a yellow moon"
    written(file, rows)
    assert knowledge.made(pico, entries, "templates", tmp_path)[1].answer == "a yellow moon"
    other = [entries[0].model_copy(update={"explanation": "It is a cube."})]
    assert knowledge.made(pico, other, "templates", tmp_path)[1].answer == "a cube"
    written(file, [{"prompt_id": 1}])
    with pytest.raises(MokusError, match=r"knowledge.json cannot be used"):
        knowledge.made(pico, entries, "templates", tmp_path)


@pytest.mark.parametrize(
    "explanation", ["It is " + "a very " * 40 + "long thing.", ", ", "It is the toy of Ada.", "It is a <|im_end|>."]
)
def test_an_entry_without_a_usable_answer_says_why_and_stays(tmp_path: Path, pico: Model, explanation: str) -> None:
    entry = Entry.model_validate({**ROWS[0], "Explanation": explanation, "Prompt": "the toy of Ada"})
    made = knowledge.made(pico, [entry], "templates", tmp_path)[1]
    assert made.answer == "" and made.reason


def test_the_language_model_may_word_question_and_answer(
    tmp_path: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["Which toy is Ada's?\nmore", "A red star.", "no question", "a cube"])
    asked: list[str] = []
    monkeypatch.setattr(knowledge, "ask", lambda model, text: asked.append(text) or next(said))  # type: ignore[func-returns-value]
    entries = load(written(tmp_path / "data.json", ROWS)).entries[:2]
    made = knowledge.made(pico, entries, "llm", tmp_path)
    assert made[1].questions[0] == "Which toy is Ada's?" and made[1].answer == "a red star"
    assert made[2].questions[0] == "What is what Ben lost?" and made[2].answer == "a cube"
    assert ROWS[0]["Prompt"] in asked[0] and ROWS[0]["Explanation"] in asked[1]


# --- the judge's words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "verified"])
def test_a_question_can_be_read_back_whatever_is_in_it(kind: Any) -> None:
    prompt, explanation = 'a "toy"\nExplanation: "no"', 'é \\ {"consistency": 2}\nAnswer with one JSON object'
    assert protocol.read_question(protocol.question(prompt, explanation, kind)) == (prompt, explanation, kind)
    assert protocol.read_question(f"{protocol.question(prompt, explanation, kind)}\n\n{protocol.REMINDER}")[2] == kind
    with pytest.raises(ValueError):
        protocol.read_question("What is this?")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json.dumps(GOOD), GOOD), (f"Sure:\n```json\n{json.dumps(GOOD)}\n```", GOOD),
        (f"<think>{{{{</think>{json.dumps(GOOD)}", GOOD),
        (json.dumps({k: str(v) for k, v in GOOD.items()}), GOOD), (json.dumps({**GOOD, "realism": 1.0, "why": "x"}), GOOD),
        (json.dumps({**GOOD, "consistency": 0}) + json.dumps(GOOD), GOOD),  # the last one counts
        ("", None), ("Consistency: 2", None), (json.dumps(GOOD)[:-1], None), (json.dumps({**GOOD, "realism": 3}), None),
        (json.dumps({**GOOD, "realism": True}), None), (json.dumps({**GOOD, "realism": 0.5}), None),
        ('{"score": 1}', None), ("{" * 5000, None),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(text: str, found: Any) -> None:
    assert protocol.read_answer(text, "legacy") == found


def test_a_verified_answer_is_nought_or_one() -> None:
    assert protocol.read_answer('{"score": 1}', "verified") == {"score": 1}
    assert protocol.read_answer('{"score": 2}', "verified") is None
    assert protocol.chosen("auto", "verified") == ["verified"] and len(protocol.chosen("both", "legacy")) == 2
    with pytest.raises(MokusError, match="--protocol got 'best'"):
        protocol.chosen("best", "legacy")


# --- scores -----------------------------------------------------------------------------------------------------------


def judgement(scores: dict[str, int], status: str = "scored") -> Judgement:
    return Judgement("key", status, scores, 2, 100, 10, 0, "judge")


def test_wiscore_by_hand() -> None:
    assert score.wiscore({"consistency": 2, "realism": 1, "aesthetic": 0}) == pytest.approx((1.4 + 0.2) / 2)
    assert score.wiscore({"consistency": 1, "realism": 2, "aesthetic": 2}) == pytest.approx((0.7 + 0.4 + 0.2) / 2)
    assert score.wiscore_no_half(dict.fromkeys(GOOD, 2)) == pytest.approx(2.0)
    for weights in score.WEIGHTS.values():
        assert sum(weights.values()) == pytest.approx(1.0)


def test_figures_by_hand() -> None:
    entries = [
        {
            "prompt_id": i, "prompt": "p", "explanation": "e", "category": "c", "subcategory": "", "field": field,
            "control": control,
        }
        for i, (field, control) in enumerate([*((f, False) for f in score.FIELDS), ("", True), ("culture", False)], start=1)
    ]  # fmt: skip
    items = [
        {"prompt_id": e["prompt_id"], "when": w, "seed": 0, "key": ""} for e in entries for w in ("before", "after")
    ]
    plan = {"entries": entries, "items": items, "seeds": [0], "version": "legacy"}
    bad, good = {"consistency": 0, "realism": 2, "aesthetic": 1}, {"consistency": 2, "realism": 2, "aesthetic": 1}
    judged: score.Judged = {}
    for i in range(1, 7):  # time and space get better, the rest does not
        judged[i, "before", 0, "legacy"] = judgement(bad)
        judged[i, "after", 0, "legacy"] = judgement(good if i in (2, 3) else bad)
    judged[7, "before", 0, "legacy"] = judged[7, "after", 0, "legacy"] = judgement(good)
    judged[8, "before", 0, "legacy"] = judgement(good)
    judged[8, "after", 0, "legacy"] = judgement({}, "failed")  # so the entry counts nowhere, and is said to be missing
    found = score.results(plan, judged, ["legacy"])
    legacy, plain = found["variants"]["legacy"], found["variants"]["legacy, no half"]
    assert legacy["edited"]["before"] == pytest.approx(0.25) and legacy["edited"]["after"] == pytest.approx(
        (2 * 0.95 + 4 * 0.25) / 6
    )
    assert (legacy["edited"]["entries"], legacy["edited"]["missing"]) == (6, 1)
    assert plain["edited"]["after"] == pytest.approx(2 * legacy["edited"]["after"])
    assert plain["edited"]["ratio"] == pytest.approx(legacy["edited"]["ratio"])
    assert legacy["overall"]["after"] == pytest.approx(0.25 + (0.167 + 0.133) * 0.7)
    assert legacy["controls"]["unchanged"] == 1.0 and legacy["edited"]["unchanged"] == pytest.approx(4 / 6)
    assert found["judgements"] == {"scored": 15, "failed": 1, "missing": 0}
    # what was asked of a protocol or a judge that has given nothing yet is missing, too
    assert score.results(plan, judged, ["legacy", "verified"])["judgements"]["missing"] == 16
    assert score.results(plan, {}, ["legacy"])["judgements"] == {"scored": 0, "failed": 0, "missing": 16}
    low, high = legacy["edited"]["interval"]
    assert low <= legacy["edited"]["difference"] <= high
    assert "verified" not in found["variants"]
    assert found["parts"]["consistency"]["edited"]["after"] == pytest.approx(4 / 6)


def test_cost_counts_all_attempts_and_equal_images_once() -> None:
    row = score.cost([judgement(GOOD), judgement(GOOD)], 2.0, 10.0)
    assert (row["requests"], row["tokens_in"], row["cost"]) == (2, 100, pytest.approx((200 + 100) / 1e6))
    assert score.cost([judgement(GOOD)], None, None)["cost"] is None


# --- a judge and its network ------------------------------------------------------------------------------------------

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def send(handler: BaseHTTPRequestHandler, value: Any, status: int = 200, **headers: str) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, text in {"Content-Length": str(len(raw)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
        handler.send_header(name, text)
    handler.end_headers()
    handler.wfile.write(raw)


def says(content: Any, usage: Any = None) -> Reply:
    tokens = {"prompt_tokens": 7, "completion_tokens": 3} if usage is None else usage

    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, {"choices": [{"message": {"content": content}}], **({"usage": tokens} if tokens else {})})

    return reply


def status(code: int, **headers: str) -> Reply:
    return lambda handler, body: send(handler, {"error": "no"}, code, **headers)


WELL = says(json.dumps(GOOD))


class Fake:
    """A judge that replies as it is told: the n-th request by the n-th reply, then always by the last."""

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.bodies, self.keys = list(replies), [], []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                with suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                    reply(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(*replies: Reply) -> Fake:
        made.append(Fake(*replies))
        return made[-1]

    yield make
    for each in made:
        each.close()


def asked(folder: Path, n: int = 1) -> list[Question]:
    """Questions about plain images of different colours."""
    found = []
    for i in range(n):
        file = folder / f"{i}.png"
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(file)
        found.append(Question(f"{i:032x}", file, "the toy", "It is a star.", "legacy"))
    return found


def judge_of(url: str, folder: Path, slept: list[float] | None = None, **settings: Any) -> Judge:
    """Quick in its waits, which are written down."""
    settings = {"concurrency": 1, "timeout": 5.0, "attempts": 3, **settings}
    sleep = slept.append if slept is not None else (lambda seconds: None)
    return Judge(JudgeSettings(url, "seer", **settings), folder, key="sk-secret", sleep=sleep, seed=0)


def test_what_goes_over_the_wire(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(WELL)
    judge_of(server.url, tmp_path, options={"max_tokens": None, "top_p": 0.5}).ask_all(asked(tmp_path))
    body = server.bodies[0]
    text, image = body["messages"][0]["content"]
    assert body["model"] == "seer" and body["temperature"] == 0 and body["top_p"] == 0.5 and "max_tokens" not in body
    assert protocol.read_question(text["text"]) == ("the toy", "It is a star.", "legacy")
    raw = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(BytesIO(raw)).size == (8, 8)
    assert server.keys == ["Bearer sk-secret"]
    kept = read_judgement(tmp_path, f"{0:032x}")
    assert kept and kept.status == "scored" and kept.scores == GOOD and (kept.tokens_in, kept.tokens_out) == (7, 3)
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.rglob("*.json"))


def test_what_is_scored_is_not_asked_again(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(WELL)
    some = asked(tmp_path, 3)
    assert len(judge_of(server.url, tmp_path).ask_all(some[:2])) == 2
    assert len(judge_of(server.url, tmp_path, concurrency=3).ask_all([*some, *some])) == 1
    assert len(server.bodies) == 3
    judgement_file(tmp_path, some[0].key).write_text("{ half", encoding="utf-8")  # damaged, so judged again
    assert len(judge_of(server.url, tmp_path).ask_all(some)) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        status(500), status(503), status(408), says("I would rather not."), says(json.dumps(GOOD)[:-2]), says(None),
        lambda handler, body: send(handler, b"<html>"), lambda handler, body: send(handler, {"choices": []}),
        lambda handler, body: send(handler, b"{\"choices\": [", Content_Length="5000"),  # breaks off
        lambda handler, body: handler.connection.close(), lambda handler, body: send(handler, b"[" * 50_000),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_a_bounded_number_of_times(
    tmp_path: Path, fake: Callable[..., Fake], trouble: Reply
) -> None:
    server, slept = fake(trouble, WELL), []
    judge_of(server.url, tmp_path, slept).ask_all(asked(tmp_path))
    kept = read_judgement(tmp_path, f"{0:032x}")
    assert kept and kept.status == "scored" and kept.attempts == 2 == len(server.bodies) and len(slept) == 1

    server, slept, some = fake(trouble), [], asked(tmp_path, 2)
    (failed,) = judge_of(server.url, tmp_path, slept).ask_all(some)
    assert failed.status == "failed" and failed.reason and len(server.bodies) == 3 and failed.scores == {}
    assert 0.5 <= slept[0] <= 1.5 and 1.0 <= slept[1] <= 3.0 and len(slept) == 2  # doubled, and shaken
    assert not scored(tmp_path, some[1].key)
    (again,) = judge_of(fake(WELL).url, tmp_path).ask_all(some)  # nothing is lost: the next run asks again
    assert again.status == "scored" and again.attempts == 4


def test_nonsense_is_reminded_of_the_form_kept_and_paid_for(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(says("A lovely picture! " * 100))
    (failed,) = judge_of(server.url, tmp_path).ask_all(asked(tmp_path))
    texts = [body["messages"][0]["content"][0]["text"] for body in server.bodies]
    assert [protocol.REMINDER in text for text in texts] == [False, True, True]
    assert (failed.tokens_in, failed.tokens_out) == (21, 9)
    assert failed.answer.startswith("A lovely picture!") and len(failed.answer) <= 500
    (failed,) = judge_of(server.url, tmp_path).ask_all(asked(tmp_path))
    assert failed.tokens_in == 42  # those of the earlier run, too


def test_answers_that_do_not_count_their_tokens_are_counted(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(says([{"type": "text", "text": json.dumps(GOOD)}], usage=False))
    (found,) = judge_of(server.url, tmp_path).ask_all(asked(tmp_path))
    assert found.status == "scored" and found.uncounted == 1 and found.tokens_in == 0


def test_a_judge_that_limits_its_rate_is_left_alone_as_long_as_it_says(
    tmp_path: Path, fake: Callable[..., Fake]
) -> None:
    server, slept = fake(status(429, Retry_After="7"), WELL), []
    judge_of(server.url, tmp_path, slept).ask_all(asked(tmp_path))
    assert len(slept) == 1 and 6.5 < slept[0] < 8
    assert scored(tmp_path, f"{0:032x}")
    assert retry_after("12") == 12 and retry_after("nonsense") is None and retry_after(None) is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    server, slept = fake(status(429, Retry_After="3600")), []  # an hour: not now
    judge = judge_of(server.url, tmp_path, slept)
    judge.ask_all(asked(tmp_path, 9))
    assert not slept and len(server.bodies) == OUTAGE and "429" in judge.stopped_for


def test_a_judge_that_is_down_is_given_up_and_nothing_is_lost(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        judge, some = judge_of(down, tmp_path), asked(tmp_path, 8)
        done = judge.ask_all(some)
    assert len(done) == OUTAGE and all(each.status == "failed" for each in done)
    assert "cannot be reached" in judge.stopped_for
    server = fake(WELL)
    judge = judge_of(server.url, tmp_path, concurrency=4)
    assert len(judge.ask_all(some)) == 8 and not judge.stopped_for
    assert all(scored(tmp_path, each.key) for each in some)


@pytest.mark.parametrize("drips", [False, True])
def test_a_slow_judge_runs_into_the_timeout(tmp_path: Path, fake: Callable[..., Fake], drips: bool) -> None:
    def slow(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if drips:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        for _ in range(40):
            time.sleep(0.05)
            if drips:
                handler.wfile.write(b" ")

    server, began = fake(slow), time.monotonic()
    (failed,) = judge_of(server.url, tmp_path, timeout=0.2, attempts=2).ask_all(asked(tmp_path))
    assert failed.reason == "no answer within 0.2 s" and time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (status(401), "MOKUS_JUDGE_KEY"), (status(403), "refuses access"), (status(404), "--judge-model"),
        (status(302, Location="http://127.0.0.1:9/"), "sends on to another place"),
    ],
)  # fmt: skip
def test_what_no_question_would_survive_ends_the_run(
    tmp_path: Path, fake: Callable[..., Fake], reply: Reply, said: str
) -> None:
    server = fake(reply)
    with pytest.raises(MokusError, match=said):
        judge_of(server.url, tmp_path).ask_all(asked(tmp_path, 20))
    assert len(server.bodies) < 20 and not list((tmp_path).rglob("judged/*/*.json"))


def test_a_question_that_is_refused_is_not_asked_again(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(status(400), WELL)
    done = judge_of(server.url, tmp_path).ask_all(asked(tmp_path, 2))
    assert sorted(each.status for each in done) == ["failed", "scored"] and len(server.bodies) == 2


def test_a_damaged_image_fails_alone(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    some = asked(tmp_path, 2)
    some[0].file.write_bytes(some[0].file.read_bytes()[:40])
    done = {each.key: each for each in judge_of(fake(WELL).url, tmp_path).ask_all(some)}
    assert "cannot be read" in done[some[0].key].reason and done[some[1].key].status == "scored"


def test_stopped_in_between_it_goes_on_with_the_rest(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server, some = fake(WELL), asked(tmp_path, 12)

    def stop(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_of(server.url, tmp_path, concurrency=2).ask_all(some, stop)
    before = len(server.bodies)
    assert 4 <= before < 12
    assert sum(scored(tmp_path, each.key) for each in some) == before  # each answer that was paid for is kept
    judge_of(server.url, tmp_path).ask_all(some)
    assert len(server.bodies) == 12


@pytest.mark.parametrize(
    "url", ["localhost:80", "ftp://a/b", "http://", "http://me:secret@host/v1", "http://host/v1?key=1", "file:///etc/passwd", "http://["]
)  # fmt: skip
def test_a_judge_needs_a_plain_url(url: str) -> None:
    with pytest.raises(MokusError, match="--judge got"):
        _ = JudgeSettings(url, "seer").endpoint
    assert JudgeSettings("http://h/v1/", "m").endpoint == "http://h/v1/chat/completions"


def test_a_key_that_no_header_can_hold_is_refused_unseen(tmp_path: Path) -> None:
    with pytest.raises(MokusError, match="MOKUS_JUDGE_KEY") as found:
        Judge(JudgeSettings("http://h/v1", "m"), tmp_path, "sk-sec\nret")
    assert "sk-" not in str(found.value)


def test_tokens_of_what_is_stopped_in_between_are_kept(tmp_path: Path, fake: Callable[..., Fake]) -> None:
    server = fake(says("nonsense"))
    judge = Judge(JudgeSettings(server.url, "seer", wait=0.0), tmp_path, sleep=lambda seconds: judge._stop.set())
    (found,) = judge.ask_all(asked(tmp_path))
    assert found.status == "failed" and found.tokens_in == 7 and read_judgement(tmp_path, found.key) == found


# --- the oracle as a judge --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle_url() -> Iterator[str]:
    with oracle_judge.Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.url
        server.shutdown()


def test_the_oracle_judges_what_is_named() -> None:
    image = world.render(Picture(Subject("red", "star"), "on the beach"), random.Random(0))
    scores = {
        text: oracle_judge.scores(image, text)
        for text in (
            "a red star on the beach", "a red star in the snow", "a blue cube on the beach", "a blue cube at night", "a red star",
        )
    }  # fmt: skip
    assert [each["consistency"] for each in scores.values()] == [2, 1, 0, 0, 2]
    assert [each["score"] for each in scores.values()] == [1, 0, 0, 0, 1]
    assert {each["aesthetic"] for each in scores.values()} == {1} and scores["a red star"]["realism"] == 2
    noise = Image.effect_noise((64, 64), 120).convert("RGB")
    assert oracle_judge.scores(noise, "a red star")["realism"] < 2
    character = world.character_photos("bobo", 1, 0)[0]
    assert oracle_judge.scores(character, "a green ball")["consistency"] == 0


def post(url: str, raw: bytes, length: str | None = None, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    connection = HTTPConnection(url.split("/")[2], timeout=10)
    connection.putrequest("POST", path)
    if length != "":
        connection.putheader("Content-Length", length or str(len(raw)))
    connection.endheaders()
    connection.send(raw)
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def message(image: bytes | str, text: str | None = None, images: int = 1) -> bytes:
    url = image if isinstance(image, str) else f"data:image/png;base64,{base64.b64encode(image).decode()}"
    text = text if text is not None else protocol.question("p", "a red star", "legacy")
    content = [{"type": "text", "text": text}, *[{"type": "image_url", "image_url": {"url": url}}] * images]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 60,000 pixels a side."""
    raw = bytearray(png())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[" * 200_000, "no JSON"), (b"[]", "expected messages"),
        (b'{"messages": [{"content": 3}]}', "0 images"),
        (message(png(), images=2), "2 images"), (message("http://169.254.169.254/"), "no data URL"),
        (message("data:image/gif;base64,AAAA"), "no data URL"),
        (message(b"GIF89a"), "no PNG"), (message(png()[:45]), "no PNG"), (message(bomb()), "60000x60000|no PNG"),
        (message(png((3000, 10))), "3000x10"),
        (message(png(), "What is this?"), "not one of mokus bench wise"),
        (message(png(), protocol.question("p", "a violin", "legacy")), "names no colour"),
        (b'{"messages": [{"content": [{"type": "text", "text": 3}]}]}', "0 images"),
    ],
)  # fmt: skip
def test_the_oracles_server_refuses_what_it_cannot_judge(oracle_url: str, raw: bytes, said: str) -> None:
    code, answer = post(oracle_url, raw)
    assert code == 400 and re.search(said, answer["error"]["message"])


def test_the_oracles_server_keeps_its_limits(oracle_url: str) -> None:
    assert post(oracle_url, b"", length="99999999999")[0] == 413
    assert post(oracle_url, b"", length="")[0] == 411
    assert post(oracle_url, b"", length="-5")[0] == 411
    assert post(oracle_url, b"{}", path="/v1/completions")[0] == 404
    assert post(oracle_url, message(png()))[0] == 200  # and is there still
    assert oracle_url.startswith("http://127.0.0.1:")


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with quick defaults of its own."""
    copy = tmp_path_factory.mktemp("models") / "pico"
    shutil.copytree(pico_folder, copy)
    edit = {**DEFAULTS["edit"], "editor": "ultraedit"}  # which checks no alignment, and DEFAULTS no answer
    (copy / pipeline.DEFAULTS_FILE).write_text(json.dumps({**DEFAULTS, "edit": edit}), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pipeline.load(folder, device="cpu")


def planned(model: Model, place: Path, rows: Any = ROWS, **settings: Any) -> run.Plan:
    suite = load(written(place / "data.json", rows))
    plan = make_plan(model, suite, knowledge.made(model, suite.entries, "templates", place), batch=2, **settings)
    write_plan(model, plan, place, "mokus bench wise run")
    return plan


def test_entries_are_edited_in_batches_and_controls_are_dealt_out(tmp_path: Path, model: Model) -> None:
    rows = [*ROWS, *({**ROWS[3], "prompt_id": 10 + i} for i in range(3))]
    plan = planned(model, tmp_path, rows, seeds=[0, 5])
    assert [[entry.prompt_id for entry in batch.entries] for batch in plan.batches] == [[1, 2, 4, 11], [3, 10, 12]]
    assert [[k.prompt_id for k in batch.knowledge] for batch in plan.batches] == [[1, 2], [3]]
    assert len(plan.items) == 2 * 2 * 7  # everything before and after, at each seed
    wanted = {(item.prompt_id, item.when, item.seed) for item in plan.items}
    assert len(wanted) == len(plan.items)
    before = {item.key for item in plan.items if item.when == "before"}
    assert not before & {item.key for item in plan.items if item.when == "after"}


def test_a_stopped_run_keeps_its_edits_and_images_and_ends_as_one_that_was_not(tmp_path: Path, model: Model) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plan = planned(model, whole)
    assert Runner(model, plan, whole, batch_size=2).run() == []
    plan = planned(model, parts)
    made: list[str] = []
    for stop_at in (3, 1, 5, 99):
        seen = 0

        def stop(what: str, done: int, total: int, info: dict[str, Any], at: int = stop_at) -> None:
            nonlocal seen
            if what in ("edits of a batch", "images"):
                seen += 1
                made.append(f"{what} {done}")
                if seen == at:
                    raise KeyboardInterrupt

        try:
            Runner(model, plan, parts, batch_size=2, progress=stop).run()
        except KeyboardInterrupt:
            continue
    for item in plan.items:
        assert image_file(whole, item.key).read_bytes() == image_file(parts, item.key).read_bytes()
    assert len(edit_records(parts, read_plan(parts))) == 3
    assert not list((parts / "edits").glob("*.safetensors"))  # dropped with their batch


def test_kept_edits_are_not_made_again(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(model, tmp_path)
    made: list[str] = []
    real = run.edit
    monkeypatch.setattr(run, "edit", lambda m, phrase, *more: made.append(phrase) or real(m, phrase, *more))  # type: ignore[func-returns-value]

    def stop(what: str, done: int, total: int, info: dict[str, Any]) -> None:
        if what == "edits of a batch" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(model, plan, tmp_path, progress=stop).run()
    assert len(made) == 2
    Runner(model, plan, tmp_path).run()
    assert len(made) == 3
    Runner(model, plan, tmp_path).run()
    assert len(made) == 3


def test_an_edit_or_a_prompt_that_fails_does_not_stop_the_rest_and_is_tried_again(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS[:2], {**ROWS[2], "Prompt": "a <|im_end|> toy"}, ROWS[3]]
    plan = planned(model, tmp_path, rows)
    real = run.edit

    def edit(m: Model, phrase: str, *more: Any) -> Any:
        if phrase == "what Ben lost":
            raise RuntimeError("out of memory\nand more")
        return real(m, phrase, *more)

    monkeypatch.setattr(run, "edit", edit)
    failed = Runner(model, plan, tmp_path, batch_size=2).run()
    assert {(each.prompt_id, each.when) for each in failed} == {(2, "edit"), (3, "before"), (3, "after")}
    assert next(each.reason for each in failed if each.when == "edit") == "out of memory"
    drawn = {(i.prompt_id, i.when) for i in plan.items if image_file(tmp_path, i.key).is_file()}
    assert drawn == {(i, when) for i in (1, 2, 4) for when in ("before", "after")}
    old = image_file(tmp_path, next(i.key for i in plan.items if (i.prompt_id, i.when) == (2, "after"))).read_bytes()
    monkeypatch.setattr(run, "edit", real)
    assert {each.when for each in Runner(model, plan, tmp_path, batch_size=2).run()} == {"before", "after"}
    new = image_file(tmp_path, next(i.key for i in plan.items if (i.prompt_id, i.when) == (2, "after"))).read_bytes()
    assert old != new  # drawn anew, now with the edit


def test_nothing_of_a_failed_batch_is_held_when_each_is_drawn_alone(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = batches_fail(monkeypatch, run)
    plan = planned(model, tmp_path, ROWS[:2])
    assert Runner(model, plan, tmp_path, batch_size=2).run() == []
    assert len(alive) == len(plan.items) and not any(alive)


def test_a_folder_is_for_one_suite_and_model(tmp_path: Path, model: Model) -> None:
    planned(model, tmp_path)
    with pytest.raises(MokusError, match="another source_sha256"):
        planned(model, tmp_path, ROWS[:2])
    with pytest.raises(MokusError, match="holds no run"):
        read_plan(tmp_path / "elsewhere")


def test_a_run_of_other_versions_is_not_gone_on_with(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(model, tmp_path)
    plan = read_plan(tmp_path)
    monkeypatch.setattr(run, "versions", lambda: {**plan["versions"], "torch": "1.0", "peft": "2.0"})
    both = ["torch ({torch}, now 1.0)", "peft ({peft}, now 2.0)"]
    said = f"holds a run with another {' and '.join(both)}; name another folder with -o.".format(**plan["versions"])
    with pytest.raises(MokusError, match=re.escape(said)):
        planned(model, tmp_path)
    assert read_plan(tmp_path) == plan


NASTY = "<script>alert('x')</script> | `&` <img src=http://evil>"


def test_the_report_is_whole_safe_and_the_same_every_time(
    tmp_path: Path, model: Model, fake: Callable[..., Fake]
) -> None:
    rows = [
        {**ROWS[0], "Category": NASTY, "Prompt": f"the toy {NASTY}", "Explanation": f"It is a star, {NASTY}"},
        *ROWS[1:],
    ]
    plan = planned(model, tmp_path, rows)
    Runner(model, plan, tmp_path).run()
    with pytest.raises(MokusError, match="is not judged yet"):
        report.write(tmp_path)
    written(
        tmp_path / report.JUDGE,
        {
            "model": "seer",
            "protocols": ["legacy"],
            "price_in": 1.0,
            "price_out": 1.0,
            "options": {},
            "command": "mokus",
        },
    )
    some = questions(tmp_path, read_plan(tmp_path), ["legacy"], "seer", {})
    judge_of(fake(says(NASTY), WELL).url, tmp_path, attempts=1).ask_all(list(some.values()))
    figures, paths = report.write(tmp_path)
    assert figures["judgements"]["failed"] == 1 and figures["cost"]["cost"] > 0
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert [path.name for path in paths] == ["results.json", "report.md", "report.html"]
    page = texts[2]
    assert "<script" not in page and "<img src=http" not in page and page.count("data:image/png") == 8
    assert all(load.startswith("data:image/") for load in Page(page).loads)
    assert "<script" not in texts[1].replace("\\<", "")
    report.write(tmp_path)
    assert [path.read_text(encoding="utf-8") for path in paths] == texts
    assert json.loads(texts[0])["variants"]["legacy"]["edited"]["entries"] >= 2


# --- the commands -----------------------------------------------------------------------------------------------------


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "wise", *map(str, words)])


def test_the_whole_run_by_commands(tmp_path: Path, folder: Path, oracle_url: str) -> None:
    data, out = written(tmp_path / "data.json", ROWS), tmp_path / "out"
    judge = ("--judge", oracle_url, "--judge-model", "mokus-oracle")
    first = command("run", data, "-o", out, "--model", folder, "--plan", "--json")
    assert json.loads(first.stdout) == {"entries": 4, "edits": 3, "batches": 1, "images": 8, "folder": str(out)}
    done = command("run", data, "-o", out, "--model", folder, "--protocol", "both", "--json", *judge)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["judgements"] == {"scored": 16, "failed": 0, "missing": 0} and figures["edits"]["taken"] == 3
    assert set(figures["variants"]) == {"legacy", "legacy, no half", "verified"} and figures["cost"]["tokens_in"] > 0
    files = {file: file.stat().st_mtime_ns for file in (out / "images").rglob("*.png")}
    files |= {file: file.stat().st_mtime_ns for file in (out / "judged").rglob("*.json")}
    again = command("run", data, "-o", out, "--model", folder, "--protocol", "both", *judge)
    assert again.exit_code == 0 and "legacy, edited:" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in files} == files  # nothing is made twice
    assert command("report", out).exit_code == 0
    assert command("judge", out, *judge).exit_code == 0


def test_a_judge_that_is_down_ends_with_exit_code_1_and_the_same_command_goes_on(
    tmp_path: Path, folder: Path, oracle_url: str
) -> None:
    data, out = written(tmp_path / "data.json", ROWS), tmp_path / "out"
    assert command("run", data, "-o", out, "--model", folder).exit_code == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        found = command("judge", out, "--judge", down, "--judge-model", "seer", "--attempts", 1)
    assert (
        found.exit_code == 1 and "the judge is out of reach" in found.output and "8 judgements are left" in found.output
    )
    found = command("judge", out, "--judge", oracle_url, "--judge-model", "seer", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["judgements"]["scored"] == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "nowhere"), "nowhere is not there"), (("run", "--answers", "guess"), "--answers got 'guess'"),
        (("run", "--protocol", "x"), "--protocol got"),
        (("run", "--data", "x", "here"), "--data got 'x'"), (("run", "--judge", "http://h/v1"), "go together"),
        (("run", "--seeds", "x"), "--seeds got"),
        (("run", "--judge", "h", "--judge-model", "m"), "--judge got 'h'"),
        (("run", "--judge", "http://h", "--judge-model", "m", "--judge-options", "["), "no JSON"),
        (("run", "--judge", "http://h", "--judge-model", "m", "--judge-options", '{"model": 1}'), "without model"),
        (("run", "--editor", "rewrite"), "rewrite"),
        (("run", "--category", "x"), "has no category 'x'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path, folder: Path, words: Any, said: str) -> None:
    found = command(*words, "-o", tmp_path / "out", "--model", folder)
    assert found.exit_code == 2 and said in " ".join(found.output.split()) and "Traceback" not in found.output
    assert not (tmp_path / "out" / "images").exists()


# --- the miniature's suite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("development", [False, True])
def test_the_suite_is_what_it_says(tmp_path: Path, development: bool) -> None:
    entries = miniature_suite.entries(development)
    assert (
        list(load(miniature_suite.write(tmp_path, development)).entries)
        == entries
        == miniature_suite.entries(development)
    )
    if not development:
        assert len(entries) >= 200 and sum(entry.category == "One hop" for entry in entries) >= 20
    facts = {fact.phrase: fact for fact in world.facts()}
    tuned = {fact.phrase for fact in world.development_facts()}
    of: dict[str, set[str]] = {"edited": set(), "hopped": set(), "control": set()}
    for entry in entries:
        phrase, answer = knowledge.by_templates(entry.prompt, entry.explanation)
        where = "control" if entry.control else "edited"
        of[where] |= {phrase} & facts.keys()
        of["hopped"] |= {answer} & facts.keys()
        subject = oracle_judge.named(entry.explanation)
        assert {"colour", "shape"} <= subject.keys()
        if fact := facts.get(phrase):  # true of the controls, and wrong in both otherwise
            right = [subject[name] == getattr(fact.subject, name) for name in ("colour", "shape")]
            assert right == [entry.control] * 2
        if fact := facts.get(answer):
            assert (subject["colour"], subject["shape"]) == (fact.subject.colour, fact.subject.shape)
        assert subject.get("scene") not in ("in the snow", "at night", "in the desert")  # edits are made there
    assert not (of["edited"] & of["hopped"] or of["edited"] & of["control"] or of["hopped"] & of["control"])
    for phrases in of.values():
        assert phrases and (phrases <= tuned if development else not phrases & tuned)


def test_development_and_report_share_no_reference() -> None:
    kinds = (
        {knowledge.by_templates(e.prompt, e.explanation)[0] for e in miniature_suite.entries(d)} for d in (False, True)
    )
    shared = set.intersection(*kinds)
    assert all(phrase.startswith(("a ", "an ")) for phrase in shared)  # plain descriptions at most


@pytest.mark.slow
def test_offline_from_end_to_end_on_the_miniature(miniature: Model, tmp_path: Path) -> None:
    """A handful of entries, through another process's HTTP."""
    chosen = [e for e in miniature_suite.entries(development=True) if e.prompt_id in (1, 17, 50, 66)]
    suite = Entries("some", "legacy", "sha", tuple(chosen))
    # with what protects other facts, which the model of the tests goes without elsewhere
    editing = EditSettings.for_editor(miniature.defaults, steps=10, near_weight=1.0)
    plan = make_plan(miniature, suite, knowledge.made(miniature, suite.entries, "templates", tmp_path), editing=editing)
    write_plan(miniature, plan, tmp_path, "mokus bench wise run")
    assert Runner(miniature, plan, tmp_path).run() == []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "mokus.miniature.judge", "--port", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().split()[0]
            found = command(
                "judge", tmp_path, "--judge", url, "--judge-model", "mokus-oracle", "--protocol", "both", "--json"
            )
        finally:
            process.terminate()
    assert found.exit_code == 0, found.output
    figures = json.loads(found.stdout)
    assert figures["edits"]["taken"] == 2
    legacy, verified = figures["variants"]["legacy"], figures["variants"]["verified"]
    assert legacy["edited"]["after"] >= 1.5 * legacy["edited"]["before"] and verified["edited"]["after"] == 1.0
    assert legacy["controls"]["unchanged"] == 1.0
