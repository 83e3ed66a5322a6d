"""The judge: any vision model behind OpenAI's chat completions, asked about every image, whatever the network does.

Every judgement is a file of its own in DIR/judged, written whole or not at all, whose name is a hash of the pixels, the
texts, the protocol, the judge and its options, so that a run that stops goes on where it was, and equal images are judged
once. A request that fails in a way that may pass (no connection, a timeout, 408, 409, 425, 429, 5xx, an answer without
scores) is made again, a bounded number of times, after a wait that doubles and is shaken; `Retry-After` is honoured, by all
threads. What still fails is recorded as failed, never as a score, and is asked again by the next run. When several
judgements in a row cannot reach the judge, the rest are left for the next run.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import http.client
import io
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from mokus.bench.knowcusbench.plan import image_file
from mokus.bench.knowcusbench.recipe import digest
from mokus.bench.wise.entries import Version
from mokus.bench.wise.protocol import EDITION, RANGES, REMINDER, question, read_answer
from mokus.errors import MokusError
from mokus.files import read_json, write_json
from mokus.progress import Progress

JUDGED = "judged"
KEY_VARIABLE = "MOKUS_JUDGE_KEY"
AGAIN = {408, 409, 425, 429}  # and 5xx: another time it may work
LONGEST_ANSWER = 1 << 20  # bytes
OUTAGE = 3  # judgements in a row that could not reach the judge
KEPT = 500  # characters of an answer that made no sense
_BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises for a file that breaks off


@dataclass(frozen=True)
class JudgeSettings:
    """Whom to ask, and how hard to try."""

    url: str
    model: str
    concurrency: int = 4
    timeout: float = 120.0  # seconds, of one request
    attempts: int = 5  # of each judgement
    wait: float = 1.0  # seconds before the second attempt; doubles
    longest_wait: float = 60.0  # seconds; an answer that asks for more than that counts as an outage
    options: dict[str, Any] = field(default_factory=dict)  # of the request's body; a value of None takes one out
    price_in: float | None = None  # per million tokens
    price_out: float | None = None

    @property
    def endpoint(self) -> str:
        """The URL of chat completions. Raises `MokusError` if it can be none."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MokusError(f"--judge got {self.url!r}, expected a URL such as http://127.0.0.1:8000/v1.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise MokusError(
                f"--judge got a URL with more than host and path; leave it out, and put a key into the variable {KEY_VARIABLE}."
            )
        plain = self.url.rstrip("/")
        return plain if plain.endswith("/chat/completions") else f"{plain}/chat/completions"


@dataclass(frozen=True)
class Question:
    """One judgement that is wanted."""

    key: str
    file: Path  # of the image
    prompt: str
    explanation: str
    protocol: Version


@dataclass
class Judgement:
    """How it went: `status` is "scored" or "failed"."""

    key: str
    status: str
    scores: dict[str, int]
    attempts: int  # of all runs
    tokens_in: int
    tokens_out: int
    uncounted: int  # answers that did not say how many tokens they took
    judge: str
    reason: str = ""
    answer: str = ""


class _Trouble(Exception):
    """A request that brought no scores."""

    def __init__(self, reason: str, again: bool = True, outage: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.outage, self.wait = again, outage, wait


class _Stopped(Exception):
    """Another thread found that there is no use in going on."""


class Judge:
    """Asks, from several threads, and keeps what it is told."""

    def __init__(
        self,
        settings: JudgeSettings,
        folder: Path,
        key: str = "",
        sleep: Callable[[float], Any] | None = None,
        seed: int | None = None,
    ) -> None:
        self.settings, self.folder, self._secret = settings, folder, key.strip()
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise MokusError(f"the key in {KEY_VARIABLE} holds characters that no header can; copy it anew.")
        self._endpoint = settings.endpoint
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._not_before = 0.0  # by the monotonic clock: a judge that wants to be left alone is, by all threads
        self._out_of_reach = 0
        here = urlsplit(settings.url).hostname in ("127.0.0.1", "::1", "localhost")  # no proxy leads there
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({} if here else None))
        self.stopped_for = ""  # why questions were left unasked

    def ask_all(self, questions: Sequence[Question], progress: Progress | None = None) -> list[Judgement]:
        """Ask what has no scores yet, and keep it; returns what was asked, in no order.

        Raises `MokusError` where no question can be answered: a wrong key, URL or model. What is answered by then is kept.
        """
        self._stop.clear()
        self._out_of_reach, self.stopped_for = 0, ""
        wanted = list({q.key: q for q in questions if not scored(self.folder, q.key)}.values())
        done: list[Judgement] = []
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = [pool.submit(self._judged, each) for each in wanted]
            try:
                for i, future in enumerate(as_completed(futures), start=1):
                    if (judgement := future.result()) is not None:
                        done.append(judgement)
                    if progress:
                        failed = sum(each.status == "failed" for each in done)
                        progress("judgements", i, len(wanted), {"failed": failed} if failed else {})
            finally:  # also of Ctrl-C: nobody waits for what is not asked yet
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return done

    def _judged(self, asked: Question) -> Judgement | None:
        """One judgement, kept; None if it was not asked, because the judge is out of reach."""
        if self._stop.is_set():
            return None
        old = read_judgement(self.folder, asked.key)
        found = Judgement(asked.key, "failed", {}, 0, 0, 0, 0, self.settings.model)
        if old:
            found.attempts, found.tokens_in, found.tokens_out = old.attempts, old.tokens_in, old.tokens_out
            found.uncounted = old.uncounted
        outage = False
        try:
            url = data_url(asked.file)
        except _BROKEN as error:
            found.reason = f"the image cannot be read ({error})"
        else:
            try:
                outage = self._try(asked, url, found)
            except _Stopped:
                if found.attempts == (old.attempts if old else 0):
                    return None
                found.reason = found.reason or "stopped in between"  # what was asked may have cost tokens
        write_json(judgement_file(self.folder, asked.key), asdict(found))
        self._tell(outage, found.reason)
        return found

    def _try(self, asked: Question, url: str, found: Judgement) -> bool:
        """Ask until there are scores or it has been enough; returns whether the judge could not be reached at last."""
        wait, reminded = self.settings.wait, False
        for attempt in range(1, self.settings.attempts + 1):
            self._wait()
            found.attempts += 1
            try:
                text = self._request(body(self.settings, asked, url, reminded), found)
                if scores := read_answer(text, asked.protocol):
                    found.scores, found.status, found.reason, found.answer = scores, "scored", "", ""
                    return False
                reminded, found.answer = True, text[:KEPT]
                raise _Trouble("the answer has no scores in it")
            except _Trouble as trouble:
                found.reason = str(trouble)
                asks_too_much = trouble.wait is not None and trouble.wait > self.settings.longest_wait
                if not trouble.again or asks_too_much or attempt == self.settings.attempts:
                    return trouble.outage
                if trouble.wait is None:
                    self._pause(min(wait, self.settings.longest_wait) * self._random.uniform(0.5, 1.5))
                else:
                    self._leave_alone(trouble.wait)
                wait *= 2
        return False

    def _leave_alone(self, seconds: float) -> None:
        """No thread asks before that."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _wait(self) -> None:
        """Until the judge wants to be asked again, a little later than it said."""
        with self._lock:
            left = self._not_before - time.monotonic()
        if left > 0:
            self._pause(left + self._random.uniform(0, 0.1 * left))
        if self._stop.is_set():
            raise _Stopped

    def _pause(self, seconds: float) -> None:
        self._sleep(seconds)
        if self._stop.is_set():
            raise _Stopped

    def _tell(self, outage: bool, reason: str) -> None:
        """Stop if it is one outage after the other."""
        with self._lock:
            self._out_of_reach = self._out_of_reach + 1 if outage else 0
            if self._out_of_reach >= OUTAGE and not self._stop.is_set():
                self.stopped_for = reason
                self._stop.set()

    # one request

    def _request(self, asked: dict[str, Any], found: Judgement) -> str:
        """The text of the judge's answer; counts its tokens. Raises `_Trouble`."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mokus"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        request = urllib.request.Request(self._endpoint, json.dumps(asked).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                raw = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except TimeoutError as error:
            raise _Trouble(f"no answer within {self.settings.timeout:g} s", outage=True) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise _Trouble(f"no answer within {self.settings.timeout:g} s", outage=True) from error
            raise _Trouble(
                f"the judge cannot be reached ({str(reason) or type(error).__name__})", outage=True
            ) from error
        return _content(raw, found)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """All of it, within the timeout: a socket's own counts from byte to byte."""
        end, parts, size = time.monotonic() + self.settings.timeout, [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LONGEST_ANSWER:
                raise _Trouble(f"the answer is longer than {LONGEST_ANSWER:,} bytes")
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:  # promised, and not sent
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError) -> _Trouble:
        """What an HTTP status means. Raises `MokusError` for one that all questions would meet."""
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        except (OSError, http.client.HTTPException):
            said = ""
        about = f"HTTP {error.code}" + (f": {said}" if said else "")
        if self._secret:
            about = about.replace(self._secret, "...")
        if 300 <= error.code < 400:
            raise MokusError(
                f"the judge at {self.settings.url} sends on to another place ({about}); name that place by --judge."
            )
        if error.code in (401, 403):
            raise MokusError(f"the judge refuses access ({about}); put its key into the variable {KEY_VARIABLE}.")
        if error.code in (404, 405):
            raise MokusError(
                f"the judge at {self.settings.url} does not know that path or {self.settings.model!r} ({about}); "
                "see --judge and --judge-model."
            )
        again = error.code in AGAIN or error.code >= 500
        return _Trouble(
            about, again, outage=again, wait=retry_after(error.headers.get("Retry-After")) if again else None
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not travel on, and a POST would turn into a GET."""

    def redirect_request(self, *given: Any) -> None:
        return None


def body(settings: JudgeSettings, asked: Question, url: str, reminded: bool = False) -> dict[str, Any]:
    """A request in OpenAI's form. `url`: the image as a data URL."""
    text = question(asked.prompt, asked.explanation, asked.protocol) + (f"\n\n{REMINDER}" if reminded else "")
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    whole = {
        "model": settings.model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 1000,
        **settings.options,
    }  # fmt: skip
    return {name: value for name, value in whole.items() if value is not None}


@lru_cache(maxsize=64)
def data_url(file: Path) -> str:
    """The pixels alone, without what the file says of them. Raises what Pillow raises for a damaged file."""
    buffer = io.BytesIO()
    with Image.open(file, formats=("PNG",)) as image:
        image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date; None if it says neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, then.timestamp() - time.time())


def _content(raw: bytes, found: Judgement) -> str:
    """The text of an answer in OpenAI's form; its tokens are added to `found`, whatever it says. Raises `_Trouble`."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Trouble("the answer is no JSON") from error
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    if all(isinstance(count, int) and count >= 0 for count in counts):
        found.tokens_in += counts[0]  # type: ignore[operator]
        found.tokens_out += counts[1]  # type: ignore[operator]
    else:
        found.uncounted += 1
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise _Trouble("the answer has not the form of a chat completion") from error
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise _Trouble("the answer has no text in it")
    return content


# --- a run's judgements -----------------------------------------------------------------------------------------------


def pixels(file: Path) -> str:
    """A hash of what an image shows. Raises what Pillow raises for a damaged file."""
    with Image.open(file, formats=("PNG",)) as image:
        return hashlib.sha256(f"{image.size} ".encode() + image.convert("RGB").tobytes()).hexdigest()


Where = tuple[int, str, int, Version]  # prompt_id, before or after, seed, protocol


def questions(
    folder: Path, plan: dict[str, Any], protocols: Sequence[Version], judge: str, options: dict[str, Any]
) -> dict[Where, Question]:
    """Every judgement that a plan asks for, of images that are drawn: by this judge, asked with these options."""
    texts = {entry["prompt_id"]: entry for entry in plan["entries"]}
    found = {}
    for item in plan["items"]:
        file = image_file(folder, item["key"])
        if not file.is_file():
            continue
        entry = texts[item["prompt_id"]]
        try:
            shown = pixels(file)
        except _BROKEN:
            shown = item["key"]  # asked about, it fails, and is recorded
        for protocol in protocols:
            parts = (
                shown,
                entry["prompt"],
                entry["explanation"],
                protocol,
                judge,
                EDITION,
                *([options] if options else []),
            )
            asked = Question(digest(*parts)[:32], file, entry["prompt"], entry["explanation"], protocol)
            found[item["prompt_id"], item["when"], item["seed"], protocol] = asked
    return found


def judgement_file(folder: Path, key: str) -> Path:
    """Where a judgement lies in a run's folder."""
    return folder / JUDGED / key[:2] / f"{key}.json"


def read_judgement(folder: Path, key: str) -> Judgement | None:
    """A judgement that was kept, or None: also for a file that is damaged, which is then judged again."""
    try:
        row = read_json(judgement_file(folder, key))
        found = Judgement(**row) if row else None
    except (MokusError, TypeError):
        return None
    whole = found is not None and (
        found.status == "failed" or any(found.scores.keys() == r.keys() for r in RANGES.values())
    )
    return found if whole else None


def scored(folder: Path, key: str) -> bool:
    """Whether there are scores already."""
    judgement = read_judgement(folder, key)
    return judgement is not None and judgement.status == "scored"
