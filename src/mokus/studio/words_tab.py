"""Words: create a concept from words alone, erase one, and see whether an edited answer shows in images."""

from __future__ import annotations

from starlette.datastructures import FormData
from starlette.responses import Response
from starlette.routing import Route

from mokus.console import parse_seeds
from mokus.editors.rewrite import rewritten
from mokus.erasure import plain
from mokus.errors import MokusError
from mokus.knowledge import normalise, phrases_to_keep, reference
from mokus.studio.jobs import Job
from mokus.studio.page import Given, Studio, check_images, lines, sent_to, shown_at, text
from mokus.studio.views import view
from mokus.transfer import Case

KINDS = ("create", "erase", "transfer")


def routes(studio: Studio) -> list[Route]:
    """Of this page."""
    home = studio.home

    def show(given: Given, error: str) -> Response:
        job = studio.job(text(given, "job"), *KINDS)
        return studio.page(
            "words.html", "/words", error,
            given=given, wrong=text(given, "form"), view=view(home, job) if job else None,
            back=f"/words?job={job.id}" if job else "",
            earlier_jobs=[view(home, each) for each in studio.jobs(*KINDS) if not job or each.id != job.id][:8],
        )  # fmt: skip

    def create(form: FormData) -> str:
        name = normalise(text(form, "name"), "name", "Zorblax")
        description = normalise(text(form, "description"), "description", "a green star")
        return shown(studio.make("create", "", name, name=name, description=description))

    def erase(form: FormData) -> str:
        phrases = lines(form, "concepts")
        if not phrases:
            raise MokusError("there is no phrase to erase, expected one such as 'the lucky charm of Boris'.")
        phrases = [reference(phrase, "concept", "the lucky charm of Boris") for phrase in phrases]
        replacement = text(form, "replacement") or None
        if replacement is None:
            for phrase in phrases:
                _needs_no_other(phrase)
        keep = phrases_to_keep(lines(form, "keep"), phrases)
        job = studio.make("erase", "", f"without-{phrases[0]}", concepts=phrases, replacement=replacement, keep=keep)
        return shown(job)

    def transfer(form: FormData) -> str:
        prompts = lines(form, "prompts")
        case = Case.of(text(form, "ask"), text(form, "answer"), prompts)
        seeds = parse_seeds(text(form, "seeds", "0-3"), "the field of seeds")
        check_images(sum(_columns(case, prompt) for prompt in case.prompts) * len(seeds))
        return shown(studio.worker.submit("transfer", ask=case.ask, answer=case.answer, prompts=prompts, seeds=seeds))

    def shown(job: Job) -> str:
        return f"/words?job={job.id}#job-{job.id}"

    acts = {"create": create, "erase": erase, "transfer": transfer}
    return [shown_at("/words", show), *(sent_to(f"/words/{name}", act, show) for name, act in acts.items())]


def _columns(case: Case, prompt: str) -> int:
    """How often transfer draws a prompt: before, after, and the answer itself if the prompt has the phrase."""
    return 2 + (rewritten(prompt, {case.knowledge: case.answer}) != prompt)


def _needs_no_other(phrase: str) -> None:
    try:
        plain(phrase)
    except MokusError as error:
        raise MokusError(
            f"{phrase!r} does not say what kind of thing it is; fill in what shall stand there."
        ) from error
