"""All jobs, the card of each, how it is stopped, resumed and forgotten; the line in the page's head that says what runs."""

from __future__ import annotations

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mokus.studio.page import Given, Studio, local, sent_to, shown_at, text
from mokus.studio.views import view

MOST = 50  # on the page


def routes(studio: Studio) -> list[Route]:
    """Of this page, and the parts of other pages that are fetched again and again."""

    def show(given: Given, error: str) -> Response:
        jobs = studio.worker.jobs()
        return studio.page(
            "jobs.html", "/jobs", error, views=[view(studio.home, job) for job in jobs[:MOST]], more=len(jobs) - MOST
        )

    def card(request: Request) -> Response:
        job = studio.worker.job(request.path_params["id"])
        back = local(request.query_params.get("back", ""), "/jobs")
        return HTMLResponse(studio.fragment("job.html", view=view(studio.home, job), back=back))

    def strip(request: Request) -> Response:
        return HTMLResponse(studio.fragment("strip.html", **running(studio)))

    def stop(form: FormData) -> str:
        studio.worker.stop(text(form, "job"))
        return local(text(form, "back"), "/jobs")

    def resume(form: FormData) -> str:
        studio.worker.resume(text(form, "job"))
        return local(text(form, "back"), "/jobs")

    def forget(form: FormData) -> str:
        studio.worker.forget(text(form, "job"))
        return "/jobs"

    return [
        shown_at("/jobs", show),
        Route("/jobs/running", strip),
        sent_to("/jobs/stop", stop, show),
        sent_to("/jobs/resume", resume, show),
        sent_to("/jobs/forget", forget, show),
        Route("/jobs/{id:str}", card),
    ]


def running(studio: Studio) -> dict[str, object]:
    """What the head's line says."""
    jobs = studio.worker.jobs()
    now = next((job for job in jobs if job.state == "running"), None)
    waiting = sum(job.state == "waiting" for job in jobs)
    return {"now": view(studio.home, now) if now else None, "waiting": waiting}
