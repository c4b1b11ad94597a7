"""The dashboard over TLS on a real server: who comes in and how long, what a key may do there, and what its pages can do to nobody."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import requests
from fastapi.routing import APIRoute

from taskplatform.api import growth
from taskplatform.api.growth import ONE_AT_A_TIME
from taskplatform.api.pages import routes, views
from taskplatform.api.pages.routes import pages
from taskplatform.api.problem import Problem
from taskplatform.api.security import Door
from taskplatform.errors import StoreUnavailable
from taskplatform.keys import KeyRefused, Scope, new_token
from taskplatform.local import EmbeddedServer, embedded_server
from taskplatform.model import JobState, Transition
from taskplatform.platform import Platform
from taskplatform.store import Store, connect
from taskplatform.store.access import MOST_SESSIONS
from tests.conftest import Clock
from tests.integration.apiserver import KEY, Api, running_api
from tests.integration.harness import offer

WRONG_KEYS = 3
MARKUP = "<script>alert('x')</script>\"&amp;"
#: For each parameter of a path, what is there in the tests.
PLACES = {"definition": "report", "user": "u1", "job_id": "sync:u1:m1", "rest": "nothing"}
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(
        tmp_path_factory.mktemp("pages"),
        server.url,
        api_wrong_keys=WRONG_KEYS,
        flower_url="http://flower.example/x",
        dashboard_session="1h",
    ) as api:
        yield api


@pytest.fixture
def api(served: Api, client: redis.Redis) -> Api:
    served.platform.publish_missing()
    served.platform.create_users(["u1", "u2"])
    return served


@pytest.fixture
def platform(api: Api) -> Platform:
    return api.platform


class Browser:
    """What a person does: pages are asked for as by a browser, and forms are sent as they stand in the page."""

    def __init__(self, api: Api, token: str | None = None) -> None:
        self._api = api
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = str(api.ca)
        if token is not None:
            answer = self.sign_in(token)
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")

    def get(self, path: str, *, status: int = 200, **options: Any) -> str:
        """The page, which is answered with this status."""
        answer = self.raw("GET", path, **options)
        assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}"
        return answer.text

    def raw(self, method: str, path: str, **options: Any) -> requests.Response:
        return self.session.request(method, self._api.url + path, timeout=60, allow_redirects=False, **options)

    def sign_in(self, token: str, **fields: str) -> requests.Response:
        """What is answered to a key in the form of the first page."""
        return self.raw("POST", "/ui/sign-in", data={"token": _token(self.get("/ui/sign-in")), "key": token, **fields})

    def send(self, page: str, action: str, **fields: str) -> requests.Response:
        """The form of a page that leads there, filled in."""
        shown = self.get(page)
        found = re.search(rf'action="{re.escape(action)}">(.*?)</form>', shown, re.DOTALL)
        assert found, f"{page} has no form for {action}"
        given = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', found[1]))
        return self.raw("POST", action, data={**{name: html.unescape(value) for name, value in given.items()}, **fields})


def _token(page: str) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page)
    assert found, page
    return found[1]


def browser(api: Api, *scopes: str, name: str = "", lifetime: timedelta | None = None) -> Browser:
    """Signed in with a new key of these scopes."""
    access = api.platform.store.access
    _, token = access.create_key(name or "-".join(scopes), set(scopes), lifetime=lifetime, actor="test", log_size=1000)
    return Browser(api, token)


def page_routes(*methods: str) -> list[tuple[str, str]]:
    """(method, a path that fits) of each route that takes one of the methods and a session."""
    routes = [route for route in pages.router.routes if isinstance(route, APIRoute)]
    found = [(method, route.path.replace(":path", "").format_map(PLACES)) for route in routes for method in sorted(route.methods or ())]
    return [(method, path) for method, path in found if method in methods and path != "/ui/sign-in"]


def dead_letter(platform: Platform, user: str = "u1", reason: str = "HTTP 500") -> str:
    """The id of a new one."""
    store = platform.store
    job_id = platform.enqueue("sync", user=user).id
    offer(store, "w1", slots=100)
    store.release()
    delivery = store.job(job_id).delivery
    assert store.start(job_id, delivery=delivery, worker="w1").go
    assert store.finish(job_id, delivery=delivery, worker="w1", state=JobState.FAILED, reason=reason, detail={"excerpt": reason})
    return job_id


# --- coming in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "taskplatform=x",
        "__Secure-taskplatform=bootstrap." + "A" * 43,
        "__Secure-taskplatform=0123456789ab." + "A" * 43,
        "a=\x01;;=;",
        '"',
    ],
)
def test_nothing_is_shown_without_a_session(api: Api, cookie: str) -> None:
    assert len(page_routes("GET")) > 10
    stranger = Browser(api)
    headers = {"Cookie": cookie} if cookie else {}
    for _, path in page_routes("GET"):
        answer = stranger.raw("GET", path, headers=headers)
        expected = "/ui/sign-in?next=" + quote("/ui/" if path == "/ui" else path, safe="")
        assert (answer.status_code, answer.headers["location"], answer.text) == (303, expected, ""), path
    for _, path in page_routes("POST"):
        answer = stranger.raw("POST", path, headers=headers, data={"token": "x"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/sign-in?ended=1"), path
    # a key in the header is for the API: a page takes it from nobody
    assert stranger.raw("GET", "/ui/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 303


def test_a_session_is_no_key_and_lies_nowhere(api: Api, client: redis.Redis, platform: Platform) -> None:
    key, token = platform.store.access.create_key("ann", {"read"}, actor="test", log_size=1000)
    guest = Browser(api)
    answer = guest.sign_in(token, next="/ui/dead-letters")
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/dead-letters")
    (name, value), *flags = [part.partition("=")[::2] for part in answer.headers["set-cookie"].split("; ")]
    assert name == "__Secure-taskplatform"
    assert sorted(flags) == [("HttpOnly", ""), ("Path", "/ui"), ("SameSite", "Strict"), ("Secure", "")]
    secret = value.partition(".")[2]
    assert token not in value
    assert len(secret) == 43
    (kept,) = client.zrange(f"tp:sessions:{key.id}", 0, -1)
    assert re.fullmatch(r"[0-9a-f]{64}", str(kept))
    assert 3500 < client.ttl(f"tp:sessions:{key.id}") <= 3600
    # the key is used by that, and the API takes no session for a key
    (listed,) = platform.store.access.list_keys()
    assert listed.last_used_ms is not None
    assert guest.raw("GET", "/v1/counts").status_code == 401
    assert guest.raw("GET", "/v1/counts", headers={"Authorization": f"Bearer {value}"}).status_code == 401
    assert "ann" in guest.get("/ui/")


def test_wrong_keys_are_counted_as_at_the_api_and_a_right_one_comes_in(api: Api, platform: Platform) -> None:
    _, token = platform.store.access.create_key("ann", {"read"}, actor="test", log_size=1000)
    guest = Browser(api)
    wrong = [new_token()[1], "nonsense", "", MARKUP, "ü" * 300][:WRONG_KEYS]
    answers = [guest.sign_in(one) for one in wrong]
    assert [one.status_code for one in answers] == [401] * WRONG_KEYS
    assert all("expired or revoked" in one.text for one in answers)
    late = guest.sign_in("nonsense")
    assert late.status_code == 429
    assert int(late.headers["retry-after"]) >= 1
    assert guest.raw("GET", "/v1/counts", headers={"Authorization": "Bearer nonsense"}).status_code == 429
    assert guest.sign_in(token).status_code == 303
    refused = [entry for entry in platform.store.access.audit() if entry.kind == "refused"]
    assert {entry.action for entry in refused} == {"POST /ui/sign-in"}
    assert len(refused) == WRONG_KEYS


def test_a_key_that_may_not_read_stays_outside(api: Api, platform: Platform) -> None:
    _, token = platform.store.access.create_key("form", {"submit"}, actor="test", log_size=1000)
    answer = Browser(api).sign_in(token)
    assert answer.status_code == 403
    assert "to look at pages takes read" in answer.text
    assert "__Secure-taskplatform=" not in answer.headers.get("set-cookie", "")


def test_nobody_is_signed_in_by_another_site(api: Api, platform: Platform) -> None:
    _, token = platform.store.access.create_key("ann", {"read"}, actor="test", log_size=1000)
    victim = Browser(api)
    form = _token(victim.get("/ui/sign-in"))
    for fields in ({"key": token}, {"key": token, "token": ""}, {"key": token, "token": "A" * 43}, {"key": token, "token": "ü"}):
        assert victim.raw("POST", "/ui/sign-in", data=fields).status_code == 403, fields
    right = {"key": token, "token": form}
    for site in ("cross-site", "same-site"):
        assert victim.raw("POST", "/ui/sign-in", data=right, headers={"Sec-Fetch-Site": site}).status_code == 403
    assert Browser(api).raw("POST", "/ui/sign-in", data=right).status_code == 403, "the form of another browser"
    assert victim.raw("POST", "/ui/sign-in", data=right, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example",
        "/ui//evil.example",
        "/ui/\\evil.example",
        "/ui/\n",
        "javascript:alert(1)",
        "/v1/jobs",
        "/ui/<x>",
        "",
    ],
)
def test_nobody_is_sent_elsewhere(api: Api, platform: Platform, elsewhere: str) -> None:
    _, token = platform.store.access.create_key("ann", {"admin"}, actor="test", log_size=1000)
    guest = Browser(api)
    assert guest.sign_in(token, next=elsewhere).headers["location"] == "/ui/"
    answer = guest.send("/ui/users/u1", "/ui/users/u1/pause", back=elsewhere)
    assert answer.headers["location"] == "/ui/?said=paused"


def test_who_follows_a_link_from_another_site_keeps_the_session(api: Api) -> None:
    """The browser sends a strict cookie only with what our own page asks for."""
    guest = Browser(api)
    came = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    page = guest.get("/ui/jobs/sync:u1:m1?x=1", headers=came)
    assert '<meta http-equiv="refresh" content="0; url=/ui/jobs/sync:u1:m1?x=1">' in page
    assert guest.raw("GET", "/ui/jobs/sync:u1:m1", headers={**came, "Sec-Fetch-Site": "same-origin"}).status_code == 303
    assert guest.raw("POST", "/ui/sign-out", headers=came).status_code == 303
    assert "evil" not in guest.get("/ui//evil.example", headers=came)


# --- how long --------------------------------------------------------------------------------------------------------


def test_a_key_that_ends_ends_its_sessions_with_the_next_request(api: Api, platform: Platform) -> None:
    access = platform.store.access
    ann, bob = browser(api, "read", name="ann"), browser(api, "read", name="bob")
    for one in (ann, bob):
        one.get("/ui/")
    access.revoke_key("ann", actor="test", log_size=1000)
    assert ann.raw("GET", "/ui/").headers["location"] == "/ui/sign-in?next=%2Fui%2F"
    assert [(entry.about, entry.key) for entry in access.audit(limit=1)] == [("the key is revoked", "ann")]
    bob.get("/ui/")
    access.rotate_key("bob", overlap=timedelta(), actor="test", log_size=1000)
    assert bob.raw("GET", "/ui/").status_code == 303
    assert access.audit(limit=1)[0].about == "the key is expired"


def test_a_session_ends_by_itself_and_with_its_key(store: Store, clock: Clock) -> None:
    access = store.access
    key, _ = access.create_key("ann", {"read"}, lifetime=2 * HOUR, actor="test", log_size=1000)
    access.open_session(key.id, "first", lifetime=HOUR)
    clock.advance(1800)
    access.open_session(key.id, "second", lifetime=3 * HOUR)
    found = access.session_key(key.id, "first")
    assert found is not None
    assert (found.id, found.name) == (key.id, "ann")
    clock.advance(1800)
    assert access.session_key(key.id, "first") is None
    assert access.session_key(key.id, "second") is not None
    assert access.session_key("0123456789ab", "second") is None
    clock.advance(3600)
    with pytest.raises(KeyRefused, match="the key is expired"):
        access.session_key(key.id, "second")


def test_sessions_of_a_key_are_bounded_and_the_oldest_go(store: Store, clock: Clock, client: redis.Redis) -> None:
    access = store.access
    key, _ = access.create_key("ann", {"read"}, actor="test", log_size=1000)
    for number in range(MOST_SESSIONS + 5):
        clock.advance(1)
        access.open_session(key.id, f"d{number}", lifetime=HOUR)
    assert client.zcard(f"tp:sessions:{key.id}") == MOST_SESSIONS
    known = [access.session_key(key.id, f"d{number}") is not None for number in range(MOST_SESSIONS + 5)]
    assert known == [False] * 5 + [True] * MOST_SESSIONS


def test_who_signs_out_is_out(api: Api) -> None:
    guest = browser(api, "read")
    before = dict(guest.session.cookies)
    answer = guest.send("/ui/", "/ui/sign-out")
    assert answer.headers["location"] == "/ui/sign-in"
    assert "Max-Age=0" in answer.headers["set-cookie"]
    thief = Browser(api)
    thief.session.cookies.update(before)
    assert thief.raw("GET", "/ui/").status_code == 303


def test_another_bootstrap_key_ends_the_sessions_of_the_one_before(api: Api, platform: Platform) -> None:
    guest = Browser(api, KEY)
    connection = {
        "scheme": "https",
        "headers": [(b"cookie", f"__Secure-taskplatform={guest.session.cookies['__Secure-taskplatform']}".encode())],
    }
    assert _door_with(platform, KEY).sessions.find(connection) is not None
    assert _door_with(platform, KEY[::-1]).sessions.find(connection) is None
    assert _door_with(platform, None).sessions.find(connection) is None


def _door_with(platform: Platform, key: str | None) -> Door:
    settings = platform.settings.model_copy(update={"api_key": None})
    if key is not None:
        settings = type(settings).model_validate({"api_key": key})
    return Door(Platform(platform.store, platform.catalogue, settings, actor="test"))


def test_over_plain_http_the_cookie_can_be_kept_and_behind_tls_it_is_secure(platform: Platform) -> None:
    plain = {"scheme": "http", "headers": []}
    for settings, secure in (
        ({}, False),
        ({"api_insecure_http": True}, True),
        ({"dashboard_url": "https://ops.example/ui/"}, True),
        ({"api_insecure_http": True, "dashboard_url": "http://ops.example/ui/"}, False),
    ):
        chosen = platform.settings.model_copy(update={"dashboard_url": None, **settings})
        cookie = Door(Platform(platform.store, platform.catalogue, chosen)).sessions.cookie(None, plain)
        assert cookie.endswith("Secure") is cookie.startswith("__Secure-") is secure, settings


# --- what a key may do -----------------------------------------------------------------------------------------------

#: By what a form leads to, the scope that it takes and the page that has it.
FORMS = {
    "/ui/definitions/report/pause": ("admin", "/ui/definitions/report"),
    "/ui/users/u1/pause": ("submit", "/ui/users/u1"),
    "/ui/users/u1/subscriptions/report/pause": ("submit", "/ui/users/u1"),
}


@pytest.mark.parametrize("scopes", [("read",), ("read", "submit"), ("admin",)])
def test_what_a_key_may_do_is_offered_and_no_more_is_done(api: Api, platform: Platform, scopes: tuple[str, ...]) -> None:
    platform.subscribe("u1", "report", params={"format": "pdf"})
    dead, waiting = dead_letter(platform), platform.enqueue("sync", user="u1", countdown=600).id
    forms = FORMS | {
        f"/ui/dead-letters/{dead}/redrive": ("submit", "/ui/dead-letters"),
        f"/ui/dead-letters/{dead}/discard": ("admin", "/ui/dead-letters"),
        f"/ui/jobs/{waiting}/cancel": ("submit", f"/ui/jobs/{waiting}"),
    }
    guest = browser(api, *scopes)
    token = _token(guest.get("/ui/"))
    for path, (scope, page) in forms.items():
        allowed = scope in scopes or "admin" in scopes
        assert (f'action="{path}"' in guest.get(page)) is allowed, path
        if not allowed:
            answer = guest.raw("POST", path, data={"token": token})
            assert answer.status_code == 403, path
            assert f"takes a key with the scope {scope}" in html.unescape(answer.text)
    if scopes == ("read",):
        assert not platform.user("u1").paused
        assert not platform.subscription("u1", "report").paused
        assert platform.job(dead).state is JobState.FAILED
        assert platform.job(waiting).state is JobState.PENDING
    assert platform.store.definition_pauses() == {}


@pytest.mark.parametrize("verb", ["redrive", "discard"])
def test_all_dead_letters_that_fit_are_counted_and_then_done(api: Api, platform: Platform, verb: str) -> None:
    reason = f"HTTP 503 {MARKUP}"
    fit = [dead_letter(platform, reason=reason) for _ in range(3)]
    others = [dead_letter(platform), dead_letter(platform, "u2", reason)]
    guest, path = browser(api, "admin", name="ann"), f"/ui/dead-letters/{verb}"
    listed = guest.get(f"/ui/dead-letters?definition=&user=u1&reason={quote(reason)}")
    (link,) = re.findall(rf'href="({path}\?[^"]*)"', listed)
    page = html.unescape(link)
    asked = guest.get(page)
    assert f"<h1>{verb.title()} 3 dead letters</h1>" in asked
    assert "<script>alert" not in asked
    assert f"taskplatform dead-letters {verb} --user u1 --reason '" in html.unescape(asked)
    assert {platform.job(one).state for one in (*fit, *others)} == {JobState.FAILED}  # it only asked
    token, fields = _token(asked), dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', asked))
    late = dead_letter(platform, reason=reason)
    done = guest.raw("POST", path, data={**{name: html.unescape(value) for name, value in fields.items()}, "token": token})
    assert done.status_code == 303, done.text
    told = "Redriven: 3." if verb == "redrive" else "Discarded: 3."
    assert f'role="status">{told}' in guest.get(done.headers["location"])
    # what died after it was counted stays as it is
    assert {job.id for job in platform.dead_letters().items} == {*others, late}
    (entry,) = [one for one in platform.store.access.audit() if one.action == f"POST {path}"]
    assert (entry.key, entry.status) == ("ann", 303)
    assert "user=u1" in entry.about
    if verb == "redrive":
        assert "redriven=3" in entry.about
        assert all("redriven by ui:ann" in [line.reason for line in platform.history(one)] for one in fit)
    else:
        assert "discarded=3" in entry.about
        assert platform.store.jobs_by_id(fit) == []
        assert "ui:ann" in {change.actor for change in platform.changes(about=["u1"])}


def test_nobody_does_it_to_all_dead_letters_by_chance(api: Api, platform: Platform) -> None:
    dead = [dead_letter(platform), dead_letter(platform, "u2")]
    guest, submits = browser(api, "admin"), browser(api, "read", "submit")
    assert "Discard all" not in submits.get("/ui/dead-letters")
    own = _token(submits.get("/ui/"))
    for verb in ("redrive", "discard"):
        path = f"/ui/dead-letters/{verb}"
        assert submits.raw("GET", path).status_code == submits.raw("POST", path, data={"token": own, "user": "u1"}).status_code == 403
        token = _token(guest.get(path))
        for fields in ({}, {"all": "0"}, {"user": " "}, {"all": "1", "user": "u1"}, {"user": "\0"}, {"user": "u1", "cursor": "x"}):
            assert guest.raw("POST", path, data={"token": token, **fields}).status_code == 422, fields
        assert "<strong>All of them</strong>" in guest.get(path)
    assert {platform.job(one).state for one in dead} == {JobState.FAILED}
    answer = guest.send("/ui/dead-letters/discard", "/ui/dead-letters/discard")
    assert "Discarded: 2." in guest.get(answer.headers["location"])
    assert platform.store.jobs_by_id(dead) == []
    assert "<h1>Discard no dead letters</h1>" in guest.get("/ui/dead-letters/discard")


def test_so_many_dead_letters_take_several_goes(api: Api, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """One go has a time; the next goes on where it ended, and comes to none that died meanwhile."""
    monkeypatch.setattr(routes, "DEAD_BUDGET", timedelta(0))
    monkeypatch.setattr(routes, "_DEAD_STEP", 2)
    monkeypatch.setattr("taskplatform.platform._DEAD_COUNTED", 2)
    dead = [dead_letter(platform) for _ in range(5)]
    guest = browser(api, "admin")
    page = "/ui/dead-letters/discard?user=u1"
    assert "<h1>Discard more than 2 dead letters</h1>" in guest.get(page)
    left = []
    while page.startswith("/ui/dead-letters/discard"):
        left.append(len(platform.store.jobs_by_id(dead)))
        page = guest.send(page, "/ui/dead-letters/discard").headers["location"]
        if len(left) == 1:
            late = dead_letter(platform)
            assert "2 are done" in guest.get(page)
    assert left[:3] == [5, 3, 1]
    assert len(left) <= 4  # whether there is more is seen only by looking
    assert {job.id for job in platform.dead_letters().items} == {late}


def test_many_are_resumed_after_it_was_said_what_that_brings(api: Api, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (routes, growth):
        monkeypatch.setattr(place, "MANY", 2)
    for user in ("u1", "u2"):
        platform.subscribe(user, "sync")
    platform.set_limit("total", "1/h", burst=1)
    platform.pause_definition("sync")
    guest, page = browser(api, "admin"), "/ui/definitions/sync/resume"
    answer = guest.send("/ui/definitions/sync", page)
    assert (answer.status_code, answer.headers["location"]) == (303, page)
    asked = guest.get(page)
    assert "It has 2 subscribers." in asked
    assert "limit total (1/h burst 1) would be used up from" in asked
    assert "sync" in platform.store.definition_pauses()
    assert browser(api, "read").raw("GET", page).status_code == 403
    assert "Resumed." in guest.get(guest.send(page, page).headers["location"])
    assert platform.store.definition_pauses() == {}


def test_a_backfill_is_counted_and_then_begun_once(api: Api, platform: Platform) -> None:
    for user in ("u1", "u2"):
        platform.subscribe(user, "sync")
    guest, path = browser(api, "admin", name="ann"), "/ui/definitions/sync/backfill"
    assert f'action="{path}"' in guest.get("/ui/definitions/sync")
    assert f'action="{path}"' not in browser(api, "read").get("/ui/definitions/sync")
    since = datetime.now(UTC) - 3 * HOUR
    page = f"{path}?since={since:%Y-%m-%dT%H:%M}&until="
    asked = guest.get(page)
    fields = {name: html.unescape(value) for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', asked)}
    since, until = (datetime.fromisoformat(fields[name]) for name in ("since", "until"))
    expected = platform.backfill("sync", since=since, until=until, dry_run=True)
    assert f"<dt>would be made</dt><dd>{expected.made} jobs</dd>" in asked
    assert expected.made >= 6
    assert platform.backfills() == []  # it only counted
    for refused in (path, f"{path}?since=x", f"{path}?since=2999-01-01T00:00", f"{path}?since={since:%Y-%m-%dT%H:%M}&rate=x"):
        assert guest.raw("GET", refused).status_code == 422, refused
    assert guest.raw("POST", path, data={"token": _token(asked), "since": "2026-11-22T09:00"}).status_code == 422
    other = browser(api, "submit", "read")
    assert other.raw("GET", page).status_code == other.raw("POST", path, data={"token": _token(other.get("/ui/"))}).status_code == 403
    for _ in range(2):  # the button was pressed twice
        answer = guest.raw("POST", path, data=fields | {"token": _token(asked)})
        assert answer.status_code == 303, answer.text
    (made,) = platform.backfills()
    assert (made.definition, made.actor, made.since_ms, made.until_ms) == ("sync", "ui:ann", expected.since_ms, expected.until_ms)
    assert "<code>taskplatform backfills list</code>" in guest.get(answer.headers["location"])


def test_each_form_takes_the_token_of_its_session(api: Api, platform: Platform) -> None:
    platform.subscribe("u1", "report", params={"format": "pdf"})
    guest, other = browser(api, "admin", name="ann"), browser(api, "admin", name="bob")
    foreign, own = _token(other.get("/ui/")), _token(guest.get("/ui/"))
    assert foreign != own
    routes = page_routes("POST")
    assert len(routes) >= 10
    for _, path in routes:
        for fields in ({}, {"token": ""}, {"token": foreign}, {"token": own[:-1]}, {"token": "ü"}):
            assert guest.raw("POST", path, data=fields).status_code == (415 if not fields else 403), (path, fields)
        assert guest.raw("POST", path, json={"token": own}).status_code == 415, path
        assert guest.raw("POST", path, data={"token": own}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403, path
        assert guest.raw("POST", path, params={"token": own}, data={"x": "y"}).status_code == 403, path
    assert not any(change.actor.startswith("ui:") for change in platform.changes())
    guest.get("/ui/")  # nor is it signed out


def test_what_is_done_is_done_and_told_to_the_logs(api: Api, platform: Platform) -> None:
    platform.subscribe("u1", "report", params={"format": "pdf"})
    dead, other = dead_letter(platform), dead_letter(platform)
    guest = browser(api, "admin", name="ann")
    subscription = "/ui/users/u1/subscriptions/report"

    def done(page: str, action: str, **fields: str) -> str:
        answer = guest.send(page, action, **fields)
        assert answer.status_code == 303, answer.text
        return guest.get(answer.headers["location"])

    assert "Paused." in done("/ui/definitions/report", "/ui/definitions/report/pause", why=f"the target moves {MARKUP}")
    assert platform.store.definition_pauses() == {"report": f"the target moves {MARKUP}"}
    assert "Resumed." in done("/ui/definitions/report", "/ui/definitions/report/resume")
    assert platform.store.definition_pauses() == {}
    done("/ui/users/u1", "/ui/users/u1/pause")
    assert platform.user("u1").paused
    done("/ui/users/u1", "/ui/users/u1/resume")
    assert not platform.user("u1").paused
    done(subscription, f"{subscription}/pause")
    assert platform.subscription("u1", "report").paused
    done("/ui/users/u1", f"{subscription}/resume")
    assert not platform.subscription("u1", "report").paused
    assert "Redriven" in done("/ui/dead-letters", f"/ui/dead-letters/{dead}/redrive")
    assert not platform.job(dead).state.terminal
    assert "redriven by ui:ann" in [line.reason for line in platform.history(dead)]
    assert "Canceled." in done(f"/ui/jobs/{dead}", f"/ui/jobs/{dead}/cancel")
    assert platform.job(dead).state is JobState.CANCELED
    assert "Discarded." in done(f"/ui/jobs/{other}", f"/ui/dead-letters/{other}/discard")
    assert platform.store.jobs_by_id([other]) == []
    assert {change.actor for change in platform.changes(about=["report"]) if "pause" in change.kind} == {"ui:ann"}
    told = [entry for entry in platform.store.access.audit() if entry.kind == "admin"]
    assert {(entry.key, entry.status) for entry in told} == {("ann", 303)}
    assert [entry.action for entry in reversed(told)] == [
        "POST /ui/sign-in",
        "POST /ui/definitions/report/pause",
        "POST /ui/definitions/report/resume",
        "POST /ui/users/u1/pause",
        "POST /ui/users/u1/resume",
        f"POST {subscription}/pause",
        f"POST {subscription}/resume",
        f"POST /ui/dead-letters/{dead}/redrive",
        f"POST /ui/jobs/{dead}/cancel",
        f"POST /ui/dead-letters/{other}/discard",
    ]


def test_what_cannot_be_done_is_said_on_a_page(api: Api, platform: Platform) -> None:
    guest = browser(api, "admin")
    token = _token(guest.get("/ui/"))
    ran = platform.enqueue("sync", user="u1", countdown=600).id
    for path, status in (
        (f"/ui/dead-letters/{ran}/redrive", 409),
        ("/ui/dead-letters/sync:u1:mffff/redrive", 404),
        ("/ui/users/nobody/pause", 404),
        ("/ui/definitions/none/pause", 404),
    ):
        answer = guest.raw("POST", path, data={"token": token})
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), path


# --- what pages hold -------------------------------------------------------------------------------------------------


def test_pages_load_nothing_and_let_nothing_in(api: Api, platform: Platform) -> None:
    dead = dead_letter(platform)
    guest = browser(api, "admin")
    paths = ["/ui/sign-in", "/ui/", "/ui/definitions", "/ui/definitions/sync", "/ui/users/u1", "/ui/users/u1/subscriptions/sync"]
    for path in (*paths, f"/ui/jobs/{dead}", "/ui/dead-letters", "/ui/forecast", "/ui/none"):
        answer = guest.raw("GET", path)
        assert answer.headers.get("set-cookie", "").count("__Secure-taskplatform=") == 0
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; "), path
        for part in ("form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert policy.count("default-src") == 1
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        for kind, name in (("style", "style-src"), ("script", "script-src")):
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                assert f"{name} 'sha256-{digest}'" in policy
        loads = re.findall(r"<(?:link|img|script|iframe|object|embed|source)\b[^>]*", answer.text)
        assert all("data:" in one or one == "<script" for one in loads), loads
        assert not re.search(r"\son\w+=|\sstyle=|url\(|@import", answer.text), path
        outside = set(re.findall(r'(?:href|src|action)="(https?:[^"]*)"', answer.text))
        assert all(url.startswith("http://flower.example/x") for url in outside), outside


def test_what_people_wrote_is_text(api: Api, platform: Platform) -> None:
    dead = dead_letter(platform, reason=MARKUP)
    platform.create_user("marked", name=MARKUP)
    platform.subscribe("marked", "sync", params={MARKUP: MARKUP})
    platform.pause_definition("sync", why=MARKUP)
    platform.enqueue("sync", user="marked", params={MARKUP: MARKUP}, countdown=600)
    job_id = platform.jobs(user="marked").items[0].id
    guest = browser(api, "admin")
    escaped = str(html.escape(MARKUP, quote=True)).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    shown = [
        f"/ui/jobs/{dead}",
        "/ui/dead-letters",
        "/ui/users/marked",
        "/ui/definitions/sync",
        "/ui/",
        f"/ui/dead-letters?reason={quote(MARKUP)}",
    ]
    for path in shown:
        page = guest.get(path)
        assert "<script>alert" not in page, path
        assert escaped in page, path
    for path in (
        f"/ui/jobs/{job_id}",
        "/ui/users/marked/subscriptions/sync",
        f"/ui/definitions?q={quote(MARKUP)}",
        f"/ui/?said={quote(MARKUP)}",
    ):
        assert "<script>alert" not in guest.get(path), path
    for path in (f"/ui/users/{quote(MARKUP, safe='')}", f"/ui/jobs/{quote(MARKUP, safe='')}", f"/ui/definitions/{quote(MARKUP, safe='')}"):
        answer = guest.raw("GET", path)
        assert answer.status_code in (404, 422)
        assert "<script>alert" not in answer.text, path
    answer = Browser(api).raw("GET", f"/ui/sign-in?next={quote(MARKUP)}")
    assert "<script>alert" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/ui/users/u1?cursor=x",
        "/ui/dead-letters?user=%00",
        "/ui/dead-letters?definition=A",
        "/ui/users/u1/subscriptions/report?at=yesterday",
        "/ui/users/u1/subscriptions/none",
        "/ui/users/none/subscriptions/report",
        "/ui/users/" + "x" * 301,
        "/ui/jobs/" + "x:" * 100,
        "/ui/definitions?q=" + "x" * 201,
        "/ui/search?user=%20%00",
        "/ui/forecast?hours=nan",
        "/ui/forecast?hours=1e9",
        "/ui/forecast?enable=report&users=-1",
        "/ui/forecast?enable=none&users=1",
        "/ui/nothing/there",
    ],
)
def test_what_cannot_be_shown_is_a_page_that_says_so(api: Api, path: str) -> None:
    answer = browser(api, "read").raw("GET", path)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "To the first page" in answer.text


@pytest.mark.parametrize(
    ("query", "leads_to"),
    [
        ("user=u1&definition=report", "/ui/users/u1/subscriptions/report"),
        ("user=%20u1%20&definition=", "/ui/users/u1"),
        ("user=u1&definition=repo", "/ui/users/u1/subscriptions/report"),
        ("definition=report", "/ui/definitions/report"),
        ("definition=e", "/ui/definitions?q=e"),
        ("user=sync:u1:m1", "/ui/jobs/sync:u1:m1"),
        ("user=a%2Bb@c", "/ui/users/a%2Bb@c"),
        ("", "/ui/"),
    ],
)
def test_the_box_leads_to_what_it_names(api: Api, query: str, leads_to: str) -> None:
    assert browser(api, "read").raw("GET", f"/ui/search?{query}").headers["location"] == leads_to


def test_the_first_page_says_how_it_is(api: Api, platform: Platform) -> None:
    dead_letter(platform)
    platform.store.planner_tick(planned=0)
    alive = timedelta(seconds=15)
    platform.store.attend("beat@host#1", catalogue="0a1b", number=None, leads=True, alive=alive, account=20 * alive)
    platform.enqueue("report", user="u1", params={"format": "x"}, countdown=600)
    platform.set_limit("total", "10/s", burst=15)
    platform.open_breaker("api.example", span=HOUR, reason="they mend it")
    page = _text(browser(api, "read").get("/ui/"))
    for words in (
        "they mend it",
        "beat@host#1 ★ leads",
        "w1 ✓ active 0 of 100",
        "high 1 0 – 0 0 – –",
        "total 10/s, bursts of 15 (live)",
        "1 dead letter ",
        "taskplatform health",
    ):
        assert words in page, page


def _text(page: str) -> str:
    """What a person reads of it."""
    body = page.partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_definitions_show_how_their_jobs_fare_page_by_page(api: Api, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_letter(platform)
    platform.pause_definition("clean")
    monkeypatch.setattr(views, "ROWS", 3)
    guest = browser(api, "read")
    first = guest.get("/ui/definitions")
    ids = re.findall(r'<a href="/ui/definitions/(\w+)">', first)
    more = re.search(r'href="(\?[^"]*)">More', first)
    assert more
    ids += re.findall(r'<a href="/ui/definitions/(\w+)">', guest.get("/ui/definitions" + html.unescape(more[1])))
    assert ids == sorted(platform.catalogue)
    assert "report ✓ active high every day at 07:00 Europe/Berlin" in _text(first)
    trouble = guest.get("/ui/definitions?show=trouble")
    assert re.findall(r'<a href="/ui/definitions/(\w+)">', trouble) == ["clean", "sync"]
    assert "0 %" in _text(trouble)
    assert re.findall(r'<a href="/ui/definitions/(\w+)">', guest.get("/ui/definitions?q=REPO")) == ["report"]


def test_jobs_are_shown_page_by_page(api: Api, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [platform.enqueue("sync", user="u1", countdown=600).id for _ in range(5)]
    dead = [dead_letter(platform, "u2") for _ in range(3)]
    monkeypatch.setattr(views, "ROWS", 2)
    guest = browser(api, "read")
    for page, wanted in (("/ui/users/u1", made), ("/ui/definitions/sync", made + dead), ("/ui/dead-letters?user=u2", dead)):
        seen: list[str] = []
        path: str | None = page
        while path:
            shown = guest.get(path)
            seen += re.findall(r'<a href="/ui/jobs/([^"]+)">', shown)
            more = re.search(r'href="(\?[^"]*)">Older', shown)
            path = page.partition("?")[0] + html.unescape(more[1]) if more else None
        assert sorted(seen) == sorted(wanted), page


def test_a_job_has_a_timeline_with_links_to_what_it_is_of(api: Api, platform: Platform) -> None:
    dead = dead_letter(platform)
    page = browser(api, "read").get(f"/ui/jobs/{dead}")
    rects = re.findall(r'<rect x="([\d.]+)" y="2" width="([\d.]+)" height="30" class="(\w+)"><title>(\w+)', page)
    assert [name for _, _, _, name in rects] == ["pending", "queued", "assigned", "running", "failed"]
    end = 0.0
    for x, width, _, _ in rects:
        assert abs(float(x) - end) < 0.1
        end = float(x) + float(width)
    assert abs(end - 1000) < 0.1
    for link in ("/ui/users/u1", "/ui/users/u1/subscriptions/sync", f"http://flower.example/x/task/{dead}"):
        assert f'href="{link}"' in page
    assert f"taskplatform jobs show {dead}" in page


def test_a_job_that_waits_says_for_what(api: Api, platform: Platform) -> None:
    platform.acting_as("ann").pause_definition("sync", why=f"the target moves {MARKUP}")
    job = platform.enqueue("sync", user="u1")
    page = html.unescape(browser(api, "read").get(f"/ui/jobs/{job.id}"))
    assert "<dt>waits</dt><dd>it waits for a pause to end: definition sync is paused by ann at " in page
    assert "<dt>what helps</dt><dd><code>taskplatform resume sync</code></dd>" in page
    assert "<dt>before it</dt><dd>nothing</dd>" in page
    platform.cancel(job.id)
    assert "<dt>waits</dt>" not in browser(api, "read", name="again").get(f"/ui/jobs/{job.id}")


def test_what_was_short_is_seen_beside_what_was_long() -> None:
    pending = Transition(0, None, JobState.PENDING, 0, "", "planned")
    queued = Transition(3_600_000, JobState.PENDING, JobState.QUEUED, 0, "", "released")
    note = Transition(3_600_000, JobState.QUEUED, JobState.QUEUED, 0, "", "noted")
    running = Transition(3_600_001, JobState.QUEUED, JobState.RUNNING, 1, "w1", "started")
    found = views.timeline([pending, queued, note, running], now_ms=3_600_500)
    assert [(one.state, one.since_ms, one.span_ms, one.ended) for one in found] == [
        ("pending", 0, 3_600_000, False),
        ("queued", 3_600_000, 1, False),
        ("running", 3_600_001, 499, False),
    ]
    assert all(one.width > 20 for one in found)
    assert sum(one.width for one in found) == pytest.approx(1000, abs=0.1)
    done = Transition(3_600_100, JobState.RUNNING, JobState.COMPLETED, 1, "w1", "HTTP 200")
    assert views.timeline([pending, queued, running, done], now_ms=9e9)[-1].span_ms == 0  # type: ignore[arg-type]


def test_a_forecast_is_drawn_and_serves_for_a_while(api: Api, platform: Platform) -> None:
    platform.subscribe("u1", "report", params={"format": "x"})
    platform.set_limit("total", "1/s", burst=2)
    offer(platform.store, "celery@host#1", slots=10)
    guest = browser(api, "read")
    query = "/ui/forecast?hours=24&enable=report&users=100000&limit=total%3D2/s%3A4&slots=3"
    page = guest.get(query)
    picture = re.search(r'<img class="plot" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert picture
    assert base64.b64decode(picture[1]).startswith(b"<svg ")
    text = _text(page)
    for words in ("would be used up", "2/s burst 4", "100,001 total", "3 are there", "forecast --hours 24 --enable report --users 100000"):
        assert words in text, text
    platform.unsubscribe("u1", "report")
    assert "100,001 total" in _text(guest.get(query))
    assert "100,000 total" in _text(guest.get(query.replace("hours=24", "hours=23")))
    for wrong in ("hours=0", "users=1&enable=none", "limit=total", "slots=-1", "limit=total%3Dfast"):
        assert guest.raw("GET", f"/ui/forecast?{wrong}").status_code in (404, 422), wrong


def test_one_forecast_is_made_at_a_time_and_the_next_is_not_waited_for_long(platform: Platform) -> None:
    with ONE_AT_A_TIME, pytest.raises(Problem) as refused:
        views.Forecasts(patience=0.01).get(platform, views.Asked(hours=1))
    assert refused.value.status == 503


# --- without Redis ---------------------------------------------------------------------------------------------------


def test_without_redis_a_page_says_so(tmp_path: Path) -> None:
    with embedded_server(tmp_path / "valkey") as own, running_api(tmp_path, own.url) as api:
        guest = Browser(api, KEY)
        guest.get("/ui/")
        with suppress(StoreUnavailable):
            connect(own.url).shutdown(nosave=True)
        answer = guest.raw("GET", "/ui/")
        assert (answer.status_code, answer.headers["content-type"]) == (503, "text/html; charset=utf-8")
        assert int(answer.headers["retry-after"]) > 0
        assert "cannot be looked at" in answer.text
        assert "taskplatform doctor" in answer.text
        answer = Browser(api).sign_in(new_token()[1])
        assert answer.status_code == 503
        assert "cannot be looked at" in answer.text


def test_scopes_are_those_of_the_api() -> None:
    """Each page route takes one, but the form in which a key is shown."""
    for route in pages.router.routes:
        assert isinstance(route, APIRoute)
        scopes = {str(scope) for dependency in route.dependant.dependencies for scope in Scope if _asks(dependency, scope)}
        assert len(scopes) == (0 if route.path == "/ui/sign-in" else 1), route.path


def _asks(dependant: Any, scope: Scope) -> bool:
    from taskplatform.api.security import requires

    return dependant.call is requires(scope) or any(_asks(one, scope) for one in dependant.dependencies)


# --- the looks -------------------------------------------------------------------------------------------------------


def test_texts_can_be_told_from_what_is_behind_them() -> None:
    """As WCAG 2.2 asks for text of any size (1.4.3, AA): a contrast of 4.5, in the light and in the dark."""
    style = resources.files("taskplatform.api.pages").joinpath("templates", "style.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root\{([^}]*)\}", style)[:2])
    assert light.keys() == dark.keys() > {"ink", "soft", "link", "good", "bad", "care", "busy", "plain"}
    for colours in (light, dark):
        for text in colours.keys() - {"back", "card", "tint", "line"}:
            for behind in ("back", "card", "tint") if text in ("ink", "soft", "bad") else ("back", "card"):
                assert _contrast(colours[text], colours[behind]) >= 4.5, (text, behind, colours[text])


def _contrast(one: str, other: str) -> float:
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
