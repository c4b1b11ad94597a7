"""The pages, and what their forms do."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated
from urllib.parse import quote

import anyio.to_thread
from fastapi import Path, Query, Request
from fastapi.responses import Response

from taskplatform.api.growth import MANY, warnings_of_resume
from taskplatform.api.jobs import known_job
from taskplatform.api.pages import frame, views
from taskplatform.api.pages.visit import Administers, Leaves, Looks, Pages, Submits, Visit, check_origin, read_form
from taskplatform.api.problem import Problem, with_status
from taskplatform.api.routing import MOST_LOOKED_AT, cursor_of, token_of
from taskplatform.api.security import Door
from taskplatform.api.sessions import ROOT, SIGN_IN
from taskplatform.backfill import DEFAULT_RATE
from taskplatform.errors import InvalidInput, UnknownDefinition, UnknownSubscription
from taskplatform.forecast import MOST_HOURS, asked_limit
from taskplatform.keys import Scope
from taskplatform.model import check_definition_id, check_user_id
from taskplatform.platform import DeadFilters
from taskplatform.schedule import next_occurrence

pages = Pages()

#: So long a page counts what a backfill would make.
BACKFILL_BUDGET = timedelta(seconds=2)
#: Occurrences of which a subscription's page says what became, and moments that it tells ahead.
WHY_LAST, NEXT_COUNT = 10, 5
#: What a forecast may be asked for at the most.
MOST_USERS, MOST_SLOTS = 100_000_000, 1_000_000
#: Seconds after which a page that shows the present is fetched again.
FRESH_SECONDS = 5

Text = Annotated[str, Query(max_length=200)]
Token = Annotated[str, Query(max_length=1000)]
Name = Annotated[str, Path(max_length=300)]


# --- coming in, and going --------------------------------------------------------------------------------------------


@pages.get("/sign-in")
def show_sign_in(request: Request, next: Annotated[str, Query(max_length=2000)] = "", ended: Text = "") -> Response:
    """The form in which a key is shown."""
    return _sign_in_form(request, next, "You are not signed in any more, and nothing was done." if ended else "")


def _sign_in_form(request: Request, then: str, wrong: str, problem: Problem | None = None) -> Response:
    sessions = _door(request).sessions
    token = sessions.visitor(request.scope)
    headers = {"Set-Cookie": sessions.visitor_cookie(token, request.scope)}
    if problem is not None:
        headers |= {name: value for name, value in problem.headers.items() if name == "Retry-After"}
    return frame.page(
        "sign_in.html", problem.status if problem else 200, headers=headers, token=token, next=frame.own_path(then), wrong=wrong
    )


def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


@pages.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Let a browser in that shows a key which may read."""
    check_origin(request)
    form = await read_form(request)
    return await anyio.to_thread.run_sync(partial(_sign_in, request, form))


def _sign_in(request: Request, form: dict[str, str]) -> Response:
    door, then = _door(request), form.get("next", "")
    if not door.sessions.is_visitor(form.get("token", ""), request.scope):
        problem = with_status(403, "the form was too old, or the browser takes no cookies from here")
        return _sign_in_form(request, then, "That form was too old, or this browser takes no cookies from here. Try again.", problem)
    try:
        key = door.admit_token(request.scope, form.get("key", ""))
    except Problem as problem:
        if problem.status == 503:
            raise
        wrong = "This is no key, or one that is expired or revoked." if problem.status == 401 else f"Not now: {problem.detail}."
        return _sign_in_form(request, then, wrong, problem)
    if not key.allows(Scope.READ):
        door.record(request.scope, key, 403)
        wrong = f"The key {key.name} has the scope {', '.join(key.scopes)}; to look at pages takes read."
        return _sign_in_form(request, then, wrong, with_status(403, wrong))
    session = door.sign_in(key)
    door.record(request.scope, key, 303)
    answer = frame.to(frame.own_path(then))
    answer.headers["Set-Cookie"] = door.sessions.cookie(session, request.scope)
    return answer


@pages.post("/sign-out")
def sign_out(visit: Leaves) -> Response:
    """End the session, here and in Redis."""
    sessions = _door(visit.request).sessions
    sessions.close(visit.session)
    answer = frame.to(SIGN_IN)
    answer.headers["Set-Cookie"] = sessions.cookie(None, visit.request.scope)
    return answer


# --- now -------------------------------------------------------------------------------------------------------------


@pages.get("")
def show_root(visit: Looks) -> Response:  # noqa: ARG001
    """The first page has a slash at its end."""
    return frame.to(f"{ROOT}/")


@pages.get("/")
def show_now(visit: Looks) -> Response:
    """How the platform is."""
    return visit.page("now.html", now=views.now(visit.platform), most=views.MOST_LISTED, refresh=FRESH_SECONDS)


@pages.get("/search")
def search(visit: Looks, user: Text = "", definition: Text = "") -> Response:
    """Lead from the box on each page to what it names."""
    user, definition = user.strip(), definition.strip()
    like = [name for name in visit.platform.catalogue if definition in name] if definition else []
    if definition not in like and len(like) == 1:
        (definition,) = like
    if user and definition:
        return frame.to(_subscription_path(check_user_id(user), check_definition_id(definition)))
    if user:
        # a job's id has the user in it
        return frame.to(f"{ROOT}/jobs/{_part(user)}" if ":" in user else f"{ROOT}/users/{_part(check_user_id(user))}")
    if definition in visit.platform.catalogue:
        return frame.to(f"{ROOT}/definitions/{_part(definition)}")
    return frame.to(f"{ROOT}/definitions", q=definition) if definition else frame.to(f"{ROOT}/")


def _part(text: str) -> str:
    return quote(text, safe="@:")


def _subscription_path(user: str, definition: str) -> str:
    return f"{ROOT}/users/{_part(user)}/subscriptions/{_part(definition)}"


# --- definitions -----------------------------------------------------------------------------------------------------


@pages.get("/definitions")
def list_definitions(visit: Looks, q: Text = "", show: Text = "", after: Text = "") -> Response:
    """Which there are, and how their jobs fare."""
    now_ms, rows, more, total = views.definitions(visit.platform, like=q, trouble=show == "trouble", after=after)
    return visit.page("definitions.html", now_ms=now_ms, rows=rows, more=more, total=total, q=q, show=show)


@pages.get("/definitions/{definition}")
def show_definition(visit: Looks, definition: Name, cursor: Token = "") -> Response:
    """One of them."""
    found = views.definition(visit.platform, definition, cursor=cursor_of(cursor or None))
    return visit.page("definition.html", found=found, next=token_of(found.jobs.cursor))


@pages.post("/definitions/{definition}/pause")
def pause_definition(visit: Administers, definition: Name) -> Response:
    """Plan and release nothing of it."""
    why = visit.form.get("why", "").strip()[:500]
    return visit.done("paused" if visit.platform.pause_definition(definition, why=why) else "unchanged")


@pages.post("/definitions/{definition}/resume")
def resume_definition(visit: Administers, definition: Name) -> Response:
    """End its pause; of one with many subscribers after it was said what that brings."""
    if visit.form.get("sure") != "1" and visit.platform.count_subscribers(definition) >= MANY:
        return frame.to(f"{ROOT}/definitions/{_part(definition)}/resume")
    return visit.done("resumed" if visit.platform.resume_definition(definition) else "unchanged")


@pages.get("/definitions/{definition}/resume")
def ask_resume(visit: Looks, definition: Name) -> Response:
    """What the end of its pause brings, and whether it is to end."""
    _check_admin(visit, "to resume a definition")
    warnings = warnings_of_resume(visit.platform, definition)
    return visit.page("resume.html", definition=definition, subscribers=visit.platform.count_subscribers(definition), warnings=warnings)


@pages.get("/definitions/{definition}/backfill")
def ask_backfill(visit: Looks, definition: Name, since: Text = "", until: Text = "", rate: Text = "") -> Response:
    """What a backfill would make: a dry run, before it is begun."""
    _check_admin(visit, "to begin a backfill")
    begin, rate = _moment(since.strip()), rate.strip() or DEFAULT_RATE
    if begin is None:
        raise InvalidInput("from when on is not given: 2026-11-22T09:00 is a time, in UTC", field="since")
    counted, rest = visit.platform.count_backfill(
        definition,
        since=begin,
        until=_moment(until.strip()),
        users=None,
        rate=rate,
        beyond_retention=False,
        cursor=None,
        budget=BACKFILL_BUDGET,
    )
    # what is begun is what was counted, though it was "until now", and once, however often the form is sent
    fields = {"since": _iso(counted.since_ms), "until": _iso(counted.until_ms), "rate": rate, "key": secrets.token_hex(8)}
    return visit.page("backfill.html", counted=counted, whole=rest is None, fields=fields)


def _iso(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")


@pages.post("/definitions/{definition}/backfill")
def begin_backfill(visit: Administers, definition: Name) -> Response:
    """Begin it, for all subscribers."""
    form = visit.form
    begin, end, key = _moment(form.get("since", "")), _moment(form.get("until", "")), form.get("key", "")
    if begin is None or end is None or not key:
        raise InvalidInput("a backfill is begun with since, until, rate and key, as its dry run gives them", field="since")
    made = visit.platform.backfill(
        definition, since=begin, until=end, rate=form.get("rate", DEFAULT_RATE), idempotency_key=f"ui:{visit.key.name}:{key}"
    )
    visit.note(backfill=made.id)
    return visit.done("backfill")


# --- users -----------------------------------------------------------------------------------------------------------


@pages.get("/users/{user}")
def show_user(visit: Looks, user: Name, cursor: Token = "") -> Response:
    """A user, what is subscribed to, and what became of it."""
    found = views.user(visit.platform, user, cursor=cursor_of(cursor or None))
    coming = visit.platform.coming(user)
    moments = {one.definition: one for one in reversed(coming.moments)}
    return visit.page("user.html", found=found, moments=moments, nothing=coming.none, next=token_of(found.jobs.cursor))


@pages.post("/users/{user}/pause")
def pause_user(visit: Submits, user: Name) -> Response:
    """Plan and release nothing for this user."""
    return visit.done("paused" if visit.platform.pause_user(user) else "unchanged")


@pages.post("/users/{user}/resume")
def resume_user(visit: Submits, user: Name) -> Response:
    """End the user's pause."""
    return visit.done("resumed" if visit.platform.resume_user(user) else "unchanged")


@pages.get("/users/{user}/subscriptions/{definition}")
def show_subscription(visit: Looks, user: Name, definition: Name, at: Text = "", cursor: Token = "") -> Response:
    """Why a user's jobs of a definition ran or did not, and when the next ones will."""
    platform = visit.platform
    owner = platform.user(user)
    try:
        subscription = platform.subscription(user, definition)
    except UnknownSubscription:
        subscription = None
    known = platform.catalogue.get(definition)
    if known is None and subscription is None:
        raise UnknownDefinition(f"no definition {definition!r}")
    moment = _moment(at)
    answers = views.told_once(platform.why(user, definition, at=moment, last=1 if moment else WHY_LAST))
    schedule = (subscription.schedule if subscription else None) or (known.schedule if known else None)
    now_ms = platform.now_ms()
    why_paused = platform.store.definition_pauses().get(definition, "")
    jobs = platform.jobs(
        user=user, definition=definition if known else None, cursor=cursor_of(cursor or None), limit=views.ROWS, scan=MOST_LOOKED_AT
    )
    return visit.page(
        "subscription.html",
        now_ms=now_ms,
        user=owner,
        definition=definition,
        known=known,
        subscription=subscription,
        how=views.how(subscription, owner, bool(why_paused)) if subscription else "not_subscribed",
        why_paused=why_paused,
        schedule=schedule,
        next_ms=next_occurrence(schedule, now_ms) if schedule else None,
        answers=answers,
        coming=platform.coming(user, definition, count=NEXT_COUNT) if subscription else None,
        items=jobs.items,
        next=token_of(jobs.cursor),
        at=at,
    )


def _moment(text: str) -> datetime | None:
    """What a field of a form says of an instant: `2026-11-22T09:00`, in UTC unless it says otherwise. Raises InvalidInput."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else datetime.fromisoformat(f"{text}+00:00")
    except ValueError:
        raise InvalidInput(f"{text!r} is no time: 2026-11-22T09:00 is, in UTC", field="at") from None


@pages.post("/users/{user}/subscriptions/{definition}/pause")
def pause_subscription(visit: Submits, user: Name, definition: Name) -> Response:
    """Plan and release nothing of it."""
    return visit.done("paused" if visit.platform.pause_subscription(user, definition) else "unchanged")


@pages.post("/users/{user}/subscriptions/{definition}/resume")
def resume_subscription(visit: Submits, user: Name, definition: Name) -> Response:
    """End its pause."""
    return visit.done("resumed" if visit.platform.resume_subscription(user, definition) else "unchanged")


# --- jobs ------------------------------------------------------------------------------------------------------------


@pages.get("/jobs/{job_id}")
def show_job(visit: Looks, job_id: Name) -> Response:
    """A job's way, as a timeline."""
    found = views.job(visit.platform, known_job(job_id))
    return visit.page("job.html", found=found, refresh=0 if found.job.state.terminal else FRESH_SECONDS)


@pages.post("/jobs/{job_id}/cancel")
def cancel_job(visit: Submits, job_id: Name) -> Response:
    """It never starts, or is stopped."""
    visit.platform.cancel(known_job(job_id))
    return visit.done("canceled")


@pages.get("/dead-letters")
def list_dead_letters(visit: Looks, definition: Text = "", user: Text = "", reason: Text = "", cursor: Token = "") -> Response:
    """Jobs that failed for good."""
    found = visit.platform.dead_letters(
        definition=definition.strip() or None,
        user=user.strip() or None,
        reason=reason.strip(),
        cursor=cursor_of(cursor or None),
        limit=views.ROWS,
        scan=MOST_LOOKED_AT,
    )
    filters = {"definition": definition, "user": user, "reason": reason}
    return visit.page(
        "dead.html", now_ms=visit.platform.now_ms(), jobs=found.items, next=token_of(found.cursor), filters=filters, cursor=cursor
    )


#: What is asked, and what is said when it is done, by what is done to all dead letters that fit.
_DEAD = {"redrive": "redriven_all", "discard": "discarded_all"}
#: So long one page counts dead letters, and one form redrives or discards them; what is left then takes another.
DEAD_BUDGET = timedelta(seconds=5)
_DEAD_STEP = 500


@pages.get("/dead-letters/redrive")
def ask_redrive_all(
    visit: Looks, definition: Text = "", user: Text = "", reason: Text = "", cursor: Token = "", done: Text = ""
) -> Response:
    """Whether all that fit are to run again."""
    return _ask_dead(visit, "redrive", {"definition": definition, "user": user, "reason": reason}, cursor, done)


@pages.get("/dead-letters/discard")
def ask_discard_all(
    visit: Looks, definition: Text = "", user: Text = "", reason: Text = "", cursor: Token = "", done: Text = ""
) -> Response:
    """Whether all that fit are to be forgotten."""
    return _ask_dead(visit, "discard", {"definition": definition, "user": user, "reason": reason}, cursor, done)


def _ask_dead(visit: Visit, verb: str, given: Mapping[str, str], token: str, done: str) -> Response:
    _check_admin(visit, f"to {verb} many dead letters")
    filters, fields = _dead_filters(given)
    count, whole, cursor = visit.platform.count_dead(filters, cursor=cursor_of(token or None), budget=DEAD_BUDGET)
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in fields.items()) or "--all"
    return visit.page(
        "dead_all.html",
        verb=verb,
        fields=fields,
        options=options,
        count=count,
        whole=whole,
        cursor=token_of(cursor),
        done=int(done) if done.isascii() and done.isdigit() else 0,
    )


def _check_admin(visit: Visit, what: str) -> None:
    """For a page that only asks whether to do what takes that scope."""
    if not visit.key.allows(Scope.ADMIN):
        raise with_status(403, f"{what} takes a key with the scope {Scope.ADMIN}")


def _dead_filters(given: Mapping[str, str]) -> tuple[DeadFilters, dict[str, str]]:
    """What fields of a form or a query select, and those that do."""
    fields = {name: text for name in ("definition", "user", "reason") if (text := given.get(name, "").strip())}
    return DeadFilters(definition=fields.get("definition"), user=fields.get("user"), reason=fields.get("reason", "")), fields


@pages.post("/dead-letters/redrive")
def redrive_all(visit: Administers) -> Response:
    """Run all again that fit, as far as the time goes."""
    return _act_on_dead(visit, "redrive")


@pages.post("/dead-letters/discard")
def discard_all(visit: Administers) -> Response:
    """Forget all that fit, as far as the time goes."""
    return _act_on_dead(visit, "discard")


def _act_on_dead(visit: Visit, verb: str) -> Response:
    filters, fields = _dead_filters(visit.form)
    if bool(fields) == (visit.form.get("all") == "1"):
        raise InvalidInput("give filters (user, definition, reason), or all=1: nobody does it to all by forgetting a word")
    cursor = cursor_of(visit.form.get("cursor") or None)
    deadline = time.monotonic() + DEAD_BUDGET.total_seconds()
    number = left = 0
    try:
        while True:
            if verb == "redrive":
                redriven, removed, cursor = visit.platform.redrive_page(filters, cursor=cursor, limit=_DEAD_STEP)
                number, left = number + redriven, left + removed
            else:
                discarded, cursor = visit.platform.discard_page(filters, cursor=cursor, limit=_DEAD_STEP)
                number += discarded
            if cursor is None or time.monotonic() >= deadline:
                break
    finally:
        # also of a call that broke off in the midst
        visit.note(**(fields or {"all": "1"}), **{_DEAD[verb].removesuffix("_all"): str(number)})
    if cursor is not None:
        return frame.to(f"{ROOT}/dead-letters/{verb}", **fields, cursor=token_of(cursor) or "", done=str(number))
    return visit.done("left" if left else _DEAD[verb], number=number)


@pages.post("/dead-letters/{job_id}/redrive")
def redrive(visit: Submits, job_id: Name) -> Response:
    """Run it again."""
    visit.platform.redrive(known_job(job_id))
    return visit.done("redriven")


@pages.post("/dead-letters/{job_id}/discard")
def discard(visit: Administers, job_id: Name) -> Response:
    """Forget it."""
    visit.platform.discard(known_job(job_id))
    return visit.done("discarded")


# --- what is to come -------------------------------------------------------------------------------------------------


_forecasts = views.Forecasts()


@pages.get("/forecast")
def show_forecast(visit: Looks, hours: Text = "24", enable: Text = "", users: Text = "", limit: Text = "", slots: Text = "") -> Response:
    """How much there will be to do, and what limits and workers make of it."""
    asked = views.Asked(
        hours=_number(hours, "hours", most=MOST_HOURS),
        enable=((visit.platform.definition(enable.strip()).id, int(_number(users, "users", most=MOST_USERS))),) if enable.strip() else (),
        limits=(asked_limit(limit.strip()),) if limit.strip() else (),
        slots=int(_number(slots, "slots", most=MOST_SLOTS)) if slots.strip() else None,
    )
    fields = {"hours": hours, "enable": enable, "users": users, "limit": limit, "slots": slots}
    return visit.page("forecast.html", found=_forecasts.get(visit.platform, asked), fields=fields, most=views.MOST_LISTED)


def _number(text: str, name: str, *, most: float) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= most:
        raise InvalidInput(f"{name} {text!r} is not accepted: a number up to {most:,.0f} is", field=name)
    return found


# --- anything else ---------------------------------------------------------------------------------------------------


@pages.get("/{rest:path}")
def nothing(visit: Looks, rest: str) -> Response:  # noqa: ARG001
    """There is no such page."""
    raise with_status(404, "there is no such page")
