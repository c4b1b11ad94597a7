"""The store's verbs, typed. See the package's docstring for what they promise."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import redis

from taskplatform.errors import (
    Conflict,
    InvalidInput,
    InvalidTransition,
    UnknownDefinition,
    UnknownJob,
    UnknownSubscription,
    UnknownUser,
    UnknownWorker,
)
from taskplatform.model import (
    TRANSITIONS,
    USER_ID,
    CallReport,
    Job,
    JobState,
    Limit,
    Priority,
    Schedule,
    Subscription,
    Transition,
    User,
    schedule_from_json,
    schedule_to_json,
    slot,
)
from taskplatform.store.access import Access
from taskplatform.store.connection import connect
from taskplatform.store.evidence import Evidence
from taskplatform.store.figures import Figures, read_figures
from taskplatform.store.keys import key
from taskplatform.store.levels import LogLevels
from taskplatform.store.outlook import Outlook, read_outlook
from taskplatform.store.records import (
    Beat,
    Breaker,
    Change,
    Commitment,
    DeadLetterResult,
    DueItem,
    Enqueue,
    Garbage,
    Group,
    LimitState,
    Newer,
    Occurrence,
    Opening,
    Orders,
    Page,
    PublishedDefinition,
    Renewal,
    Start,
    Stop,
    Subscribe,
    SubscribeResult,
    Vitals,
    Worker,
    batches,
    read_beat,
    read_breaker,
    read_calls,
    read_commitment,
    read_counts,
    read_creation,
    read_due_item,
    read_job,
    read_limit,
    read_occurrence,
    read_packed,
    read_queues,
    read_transition,
    read_worker,
    write_limit,
    write_rule,
)
from taskplatform.store.scripts import Clock, Scripts, greeting

T = TypeVar("T")

log = logging.getLogger(__name__)

_BATCH = 500
_DEAD_LETTER_RESULTS = {
    "unknown": DeadLetterResult.GONE,
    "not dead": DeadLetterResult.NOT_DEAD,
    "removed": DeadLetterResult.REMOVED,
}
#: A job whose runs were held up before their calls this often fails.
_MOST_GIVEN_BACK = 20
#: A job whose definition a worker did not know this often is rejected. It waits longer each time: about a quarter of an hour in all.
_MOST_REFUSALS = 20
_REFUSED_FOR = timedelta(seconds=5)
#: What is kept of messages that no worker can take.
_MOST_GARBAGE = 1000
_MOST_GARBAGE_BYTES = 4096


def milliseconds(duration: timedelta) -> int:
    """A duration as the scripts take it."""
    return round(duration / timedelta(milliseconds=1))


class Store:
    """All verbs over one namespace. Safe to share between threads; make a new one after a fork."""

    def __init__(self, client: redis.Redis, *, namespace: str = "tp", change_log_size: int = 100_000, clock: Clock | None = None) -> None:
        self._redis = client
        self._namespace = namespace
        self._log_size = change_log_size
        self._clock = clock
        self._scripts = Scripts(client, namespace, clock)
        self.access = Access(client, self._scripts, self._key, clock)
        self.log_levels = LogLevels(client, self._scripts, self._key, clock)
        self.evidence = Evidence(client, self._key, clock)

    @classmethod
    def connect(cls, url: str, *, tls: Mapping[str, Any] | None = None, namespace: str = "tp", change_log_size: int = 100_000) -> Store:
        """The store at a Redis URL; `tls` as for `connection.connect`. Raises StoreError for a URL that is none."""
        return cls(connect(url, tls=tls, greet=greeting(namespace)), namespace=namespace, change_log_size=change_log_size)

    def _key(self, name: str, part: str = "") -> str:
        return key(self._namespace, name, part)

    def now_ms(self) -> int:
        """The server's clock, or the one that was given."""
        if self._clock is not None:
            return self._clock()
        seconds, microseconds = self._redis.time()
        return seconds * 1000 + microseconds // 1000

    def ping(self) -> None:
        """Raise StoreError when Redis does not answer."""
        self._redis.ping()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # definitions

    def publish(self, definition: PublishedDefinition, *, actor: str, only_new: bool = False, term: int | None = None) -> bool:
        """Tell the scripts of a definition. Returns whether that changed something.

        With `term`, raises Conflict when another leads by now.
        """
        fields = {
            "priority": definition.priority.value,
            "overlap": definition.overlap,
            "message": definition.message,
            "window": str(milliseconds(definition.window)),
            "version": definition.version,
            "timeout": "" if definition.timeout is None else str(milliseconds(definition.timeout)),
        }
        flat = [part for pair in fields.items() for part in pair]
        schedule = schedule_to_json(definition.schedule)
        since = "" if term is None else term
        limit = "" if definition.limit == Limit() else write_limit(definition.limit)
        host = "keep" if definition.host is None else definition.host
        size = self._log_size
        return self._led(self._scripts.run("publish", definition.id, schedule, int(only_new), actor, size, since, limit, host, *flat))

    def announce(self, *, actor: str) -> None:
        """One entry of the change log for all definitions that were published for the first time since the last."""
        self._scripts.run("announce", actor, self._log_size)

    def retract(self, definition: str, *, actor: str, term: int | None = None) -> bool:
        """Remove a definition; what waits of it is rejected when its turn comes. With `term`, raises Conflict as `publish` does."""
        return self._led(self._scripts.run("retract", definition, actor, self._log_size, "" if term is None else term))

    @staticmethod
    def _led(answer: int) -> bool:
        if answer == -1:
            raise Conflict("another planner leads by now")
        return bool(answer)

    def published(self) -> set[str]:
        """Ids of the definitions that the scripts know."""
        return cast("set[str]", self._redis.smembers(self._key("definitions")))

    def versions(self, definitions: Sequence[str]) -> list[str | None]:
        """The versions in which these are published. None: not, or by a release that had no versions."""
        pipe = self._redis.pipeline(transaction=False)
        for definition in definitions:
            pipe.hget(self._key("definition", definition), "version")
        return pipe.execute()

    def pause_definition(self, definition: str, *, why: str, actor: str) -> bool:
        """Nothing of it is planned or released until it is resumed. Raises UnknownDefinition."""
        return self._pause_definition(definition, why or "no reason given", actor)

    def resume_definition(self, definition: str, *, actor: str) -> bool:
        """The reverse. Raises UnknownDefinition."""
        return self._pause_definition(definition, "", actor)

    def _pause_definition(self, definition: str, why: str, actor: str) -> bool:
        answer = self._scripts.run("pause_definition", definition, why, actor, self._log_size)
        if answer == -1:
            raise UnknownDefinition(f"no definition {definition!r} is published")
        return bool(answer)

    def definition_pauses(self) -> dict[str, str]:
        """Paused definitions and why."""
        ids = sorted(self.published())
        pipe = self._redis.pipeline(transaction=False)
        for definition in ids:
            pipe.hget(self._key("definition", definition), "paused")
        return {definition: why for definition, why in zip(ids, pipe.execute(), strict=True) if why}

    # users

    def create_user(self, user: str, *, name: str = "", actor: str) -> bool:
        """Returns False when the user exists."""
        return bool(self._scripts.run("create_user", user, name, actor, self._log_size))

    def create_users(self, users: Iterable[str], *, actor: str) -> int:
        """Create many, without an entry in the change log for each. Returns how many were new."""
        made = 0
        for batch in batches(users, _BATCH):
            made += int(self._scripts.run("create_users", *batch))
        if made:
            self._log(actor, "users created", "", f"{made} users")
        return made

    def delete_user(self, user: str, *, actor: str) -> tuple[int, int]:
        """Delete with all that belongs to the user. Returns (jobs canceled, subscriptions removed). Raises UnknownUser."""
        canceled, subscriptions = self._scripts.run("delete_user", user, actor, self._log_size)
        if canceled == -1:
            raise _no_user(user)
        return canceled, subscriptions

    def pause_user(self, user: str, *, actor: str) -> bool:
        """Nothing is planned or released for the user until they are resumed. Raises UnknownUser."""
        return self._pause_user(user, 1, actor)

    def resume_user(self, user: str, *, actor: str) -> bool:
        """The reverse. Raises UnknownUser."""
        return self._pause_user(user, 0, actor)

    def _pause_user(self, user: str, pause: int, actor: str) -> bool:
        answer = self._scripts.run("pause_user", user, pause, actor, self._log_size)
        if answer == -1:
            raise _no_user(user)
        return bool(answer)

    def user(self, user: str) -> User:
        """Raises UnknownUser."""
        fields = self._user_fields(user)
        return User(user, int(fields["@created"]), fields.get("@paused") == "1", fields.get("@name", ""))

    def users(self, *, cursor: str | None = None, limit: int = 100) -> Page[User]:
        """In order of their ids."""
        start = f"({cursor}" if cursor else "-"
        ids = cast("list[str]", self._redis.zrange(self._key("users"), start, "+", bylex=True, offset=0, num=limit))
        pipe = self._redis.pipeline(transaction=False)
        for user in ids:
            pipe.hmget(self._key("user", user), "@created", "@paused", "@name")
        rows = pipe.execute()
        items = tuple(
            User(user, int(created), paused == "1", name or "") for user, (created, paused, name) in zip(ids, rows, strict=True) if created
        )
        return Page(items, ids[-1] if len(ids) == limit else None)

    def count_users(self) -> int:
        """How many users there are."""
        return self._redis.zcard(self._key("users"))

    def missing_users(self, users: Iterable[str]) -> set[str]:
        """Those that do not exist."""
        missing: set[str] = set()
        for batch in batches(dict.fromkeys(users), 5000):
            pipe = self._redis.pipeline(transaction=False)
            for user in batch:
                pipe.exists(self._key("user", user))
            missing.update(user for user, exists in zip(batch, pipe.execute(), strict=True) if not exists)
        return missing

    def _user_fields(self, user: str) -> dict[str, str]:
        fields = cast("dict[str, str]", self._redis.hgetall(self._key("user", user)))
        if not fields:
            raise _no_user(user)
        return fields

    # subscriptions

    def subscribe(self, subscriptions: Sequence[Subscribe], *, horizon: timedelta, actor: str, log: bool = True) -> list[SubscribeResult]:
        """Make or change subscriptions, each on its own; answers in the same order."""
        answers: list[SubscribeResult] = []
        for batch in batches(subscriptions, 200):
            args: list[str | int] = []
            for one in batch:
                gid, schedule = self._group_of(one)
                params = "keep" if one.params is None else (_to_json(one.params) if one.params else "")
                enabled = "keep" if one.enabled is None else ("on" if one.enabled else "off")
                args += [one.user, one.definition, repr(slot(one.user, one.definition)), gid, schedule, params, enabled]
            log_size = self._log_size if log else ""
            found = self._scripts.run("subscribe", milliseconds(horizon), actor, log_size, *args)
            answers += [SubscribeResult(answer) for answer in found]
        if not log and any(answer > 0 for answer in answers):
            self._log(actor, "subscriptions imported", "", f"{sum(answer > 0 for answer in answers)} created or changed")
        return answers

    @staticmethod
    def _group_of(one: Subscribe) -> tuple[str, str]:
        if one.own_schedule is None:
            return "keep", ""
        if not one.own_schedule:
            return one.definition, ""
        assert one.schedule is not None
        text = schedule_to_json(one.schedule)
        return f"{one.definition}~{hashlib.sha256(text.encode()).hexdigest()[:12]}", text

    def unsubscribe(self, user: str, definition: str, *, actor: str) -> int:
        """Returns how many waiting jobs were canceled. Raises UnknownUser, UnknownSubscription."""
        return self._checked(self._scripts.run("unsubscribe", user, definition, actor, self._log_size), user, definition)

    def pause_subscription(self, user: str, definition: str, *, actor: str) -> bool:
        """Raises UnknownUser, UnknownSubscription."""
        answer = self._scripts.run("pause_subscription", user, definition, 1, actor, self._log_size)
        return bool(self._checked(answer, user, definition))

    def resume_subscription(self, user: str, definition: str, *, actor: str) -> bool:
        """Raises UnknownUser, UnknownSubscription."""
        answer = self._scripts.run("pause_subscription", user, definition, 0, actor, self._log_size)
        return bool(self._checked(answer, user, definition))

    @staticmethod
    def _checked(answer: int, user: str, definition: str) -> int:
        if answer == -1:
            raise _no_user(user)
        if answer == -2:
            raise UnknownSubscription(f"user {user!r} is not subscribed to {definition!r}")
        return answer

    def subscription(self, user: str, definition: str) -> Subscription:
        """Raises UnknownUser, UnknownSubscription."""
        fields = self._user_fields(user)
        if definition.startswith("@") or definition not in fields:
            self._checked(-2, user, definition)
        return self._subscriptions(user, {definition: fields[definition]})[0]

    def subscriptions_of(self, user: str) -> list[Subscription]:
        """In order of the definitions. Raises UnknownUser."""
        return self._subscriptions(user, self._user_fields(user))

    def _subscriptions(self, user: str, fields: Mapping[str, str]) -> list[Subscription]:
        raw = {definition: json.loads(value) for definition, value in sorted(fields.items()) if not definition.startswith("@")}
        groups = {definition: value["group"] for definition, value in raw.items() if "group" in value}
        schedules = self._schedules(groups.values())
        return [
            Subscription(
                user=user,
                definition=definition,
                enabled="off" not in value,
                paused="paused" in value,
                params=json.loads(value.get("params", "{}")),
                schedule=schedules.get(groups.get(definition, "")),
                since_ms=int(value["since"]),
            )
            for definition, value in raw.items()
        ]

    def subscription_params(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
        """The own parameters of (user, definition), where there are any."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for batch in batches(dict.fromkeys(pairs), 5000):
            pipe = self._redis.pipeline(transaction=False)
            for user, definition in batch:
                pipe.hget(self._key("user", user), definition)
            for pair, raw in zip(batch, pipe.execute(), strict=True):
                if raw and '"params"' in raw:
                    found[pair] = json.loads(json.loads(raw)["params"])
        return found

    def subscribed(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each (user, definition) is subscribed."""
        found: list[bool] = []
        for batch in batches(pairs, 5000):
            pipe = self._redis.pipeline(transaction=False)
            for user, definition in batch:
                pipe.hexists(self._key("user", user), definition)
            found += map(bool, pipe.execute())
        return found

    def count_subscriptions(self) -> int:
        """How many there are in all."""
        return sum(map(int, cast("dict[str, str]", self._redis.hgetall(self._key("subscribers"))).values()))

    def _schedules(self, groups: Iterable[str]) -> dict[str, Schedule]:
        ids = list(dict.fromkeys(groups))
        pipe = self._redis.pipeline(transaction=False)
        for gid in ids:
            pipe.hget(self._key("group", gid), "schedule")
        return {gid: schedule_from_json(text) for gid, text in zip(ids, pipe.execute(), strict=True) if text}

    def subscribers_of(self, definition: str, *, cursor: str | None = None, limit: int = 100) -> Page[str]:
        """Users subscribed to a definition, by group and inside it by slot; paging is stable while users come and go."""
        groups = sorted(cast("set[str]", self._redis.smembers(self._key("groups", definition))))
        at_group, _, last = (cursor or "").partition("|")
        if cursor and not (at_group and USER_ID.fullmatch(last)):
            raise InvalidInput(f"cursor {cursor!r} is not one that a listing gave", field="cursor")
        found: list[str] = []
        for gid in groups:
            if gid < at_group:
                continue
            after = last if gid == at_group else ""
            while batch := self._slots_after(gid, definition, after, limit):
                after = batch[-1]
                found += self._whose_group(gid, definition, batch)
                if len(found) >= limit:
                    return Page(tuple(found[:limit]), f"{gid}|{found[limit - 1]}")
        return Page(tuple(found), None)

    def _slots_after(self, gid: str, definition: str, user: str, count: int) -> list[str]:
        lowest = slot(user, definition) if user else 0.0
        # some more, because `user` and others of the same slot come along
        rows = cast(
            "list[tuple[str, float]]",
            self._redis.zrange(self._key("slots", gid), repr(lowest), "+inf", byscore=True, withscores=True, offset=0, num=count + 10),
        )
        return [one for one, score in rows if (score, one) > (lowest, user)]

    def _whose_group(self, gid: str, definition: str, users: Sequence[str]) -> list[str]:
        """Those who are subscribed by this group; who has just left it still has a slot there."""
        pipe = self._redis.pipeline(transaction=False)
        for user in users:
            pipe.hget(self._key("user", user), definition)
        rows = zip(users, pipe.execute(), strict=True)
        return [user for user, raw in rows if raw and json.loads(raw).get("group", definition) == gid]

    def count_subscribers(self, definition: str) -> int:
        """Over all groups of the definition."""
        return int(cast("str | None", self._redis.hget(self._key("subscribers"), definition)) or 0)

    # planning

    def lead(self, *, horizon: timedelta, leader: str) -> int:
        """Say who plans, and how far ahead. Returns the term: a number that tells this leader from all before."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(self._key("planner"), mapping={"horizon": milliseconds(horizon), "leader": leader, "since": self.now_ms()})
        pipe.hincrby(self._key("planner"), "term")
        return int(pipe.execute()[1])

    def host_of(self, definition: str) -> str | None:
        """The host that a published definition calls, if any."""
        return cast("str | None", self._redis.hget(self._key("definition", definition), "host")) or None

    def planner_tick(self, *, planned: int) -> None:
        """Say that the planner advanced."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hset(self._key("planner"), "tick", str(self.now_ms()))
        if planned:
            pipe.hincrby(self._key("planner"), "planned", planned)
        pipe.execute()

    def planner_fails(self, *, since_ms: int, error: str) -> None:
        """Say what cannot be planned, and since when."""
        self._redis.hset(self._key("planner"), mapping={"failing_since": since_ms, "error": error})

    def planner_is_well(self) -> None:
        """Say that nothing fails."""
        self._redis.hdel(self._key("planner"), "failing_since", "error")

    def planner(self) -> dict[str, str]:
        """What the planner last said of itself: horizon (ms), leader, since, term, tick (ms), planned, widened, widened_ms.

        `widened` counts the windows that limits made wider or later, `widened_ms` by how much in all. skipped_missed, skipped_paused and
        skipped_removed count occurrences that were skipped, by why. While something cannot be planned: failing_since (ms) and error.
        """
        return cast("dict[str, str]", self._redis.hgetall(self._key("planner")))

    def attend(
        self,
        beat: str,
        *,
        catalogue: str,
        number: int | None,
        leads: bool,
        alive: timedelta,
        account: timedelta,
        info: Mapping[str, str] | None = None,
    ) -> tuple[int, Newer]:
        """A beat lives. `catalogue` is a digest of what it would publish, `number` what it was told last (None: it has just started).
        `info` is what else it tells of itself.

        Who was silent for longer than `alive` does not live; for longer than `account`, counts for nothing. Returns the number of what
        it would publish, and whether there is something newer.
        """
        told = "" if number is None else number
        number, newer = self._scripts.run(
            "attend", beat, catalogue, told, int(leads), milliseconds(alive), milliseconds(account), json.dumps(info or {})
        )
        return number, Newer(newer)

    def sign_off(self, beat: str) -> None:
        """A beat stops in good order: what only it would publish is of no account from now on."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hdel(self._key("beats"), beat)
        pipe.hdel(self._key("beat_info"), beat)
        pipe.execute()

    def beats(self) -> list[Beat]:
        """Those that have not signed off, in order of their names; one that died stays for some hours."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._key("beats"))
        pipe.hgetall(self._key("beat_info"))
        lines, told = pipe.execute()
        return [read_beat(name, line, told.get(name)) for name, line in sorted(lines.items())]

    def counters(self) -> dict[str, int]:
        """How often happened what should be rare, since this Redis is used: lost workers, lost messages and the like, by name."""
        return {name: int(times) for name, times in cast("dict[str, str]", self._redis.hgetall(self._key("counters"))).items()}

    def count(self, what: str) -> None:
        """Count what a process saw itself, beside what the scripts count."""
        self._redis.hincrby(self._key("counters"), what, 1)

    def due(self, now_ms: int, *, limit: int = 100) -> list[DueItem]:
        """Groups and occurrences that the planner must look at by now, the longest due first."""
        rows = self._redis.zrange(self._key("due"), "-inf", now_ms, byscore=True, withscores=True, offset=0, num=limit)
        return [read_due_item(member, score) for member, score in cast("list[tuple[str, float]]", rows)]

    def next_due_ms(self) -> int | None:
        """When the planner is needed next."""
        rows = cast("list[tuple[str, float]]", self._redis.zrange(self._key("due"), 0, 0, withscores=True))
        return int(rows[0][1]) if rows else None

    def look_again(self) -> None:
        """Let the planner look at everything now, because the clock was set back: what was put off would be late by as much."""
        now_ms = self.now_ms()
        for batch in batches(cast("list[str]", self._redis.zrange(self._key("due"), 0, -1)), 1000):
            self._redis.zadd(self._key("due"), dict.fromkeys(batch, now_ms), xx=True, lt=True)

    def group(self, gid: str) -> Group | None:
        """None when it has gone."""
        fields = cast("dict[str, str]", self._redis.hgetall(self._key("group", gid)))
        if "definition" not in fields:
            return None
        return Group(gid, fields["definition"], schedule_from_json(fields["schedule"]), int(fields["cursor"]))

    def postpone(self, item: DueItem, *, by: timedelta) -> None:
        """Look at it later; at a group whose definition is not published no more, until it is."""
        self._scripts.run("postpone", f"{'g' if item.kind == 'group' else 'o'}|{item.id}", milliseconds(by))

    def open_occurrences(
        self, group: Group, openings: Sequence[Opening], *, cursor_ms: int, next_due_ms: int | None, window_ms: int, horizon: timedelta
    ) -> int | None:
        """Open or skip what came due and move the group's cursor. None when the group is not as it was seen.

        `window_ms` is the definition's window, for openings without another.
        """
        flat: list[str | int] = []
        for opening in openings:
            flat += [opening.at_ms, opening.at_ms if opening.last_ms is None else opening.last_ms, opening.source, opening.reason]
            flat += [window_ms if opening.window_ms is None else opening.window_ms, opening.delay_ms]
        again = "" if next_due_ms is None else next_due_ms
        seen = schedule_to_json(group.schedule)
        answer = self._scripts.run("open", group.id, group.cursor_ms, cursor_ms, again, window_ms, milliseconds(horizon), seen, *flat)
        return None if answer == -1 else max(answer, 0)

    def plan(self, oid: str, *, horizon: timedelta, batch: int) -> tuple[int, int | None]:
        """Make the jobs of the next subscribers of an open occurrence. Returns how many, and when to look again."""
        _, made, again = self._scripts.run("plan", milliseconds(horizon), oid, batch)
        return made, int(again) if again else None

    def trigger(
        self,
        definition: str,
        *,
        window: timedelta,
        actor: str,
        window_ms: int | None = None,
        delay_ms: int = 0,
        note: str = "",
        idempotency_key: str = "",
    ) -> tuple[int, int]:
        """Open an extra occurrence now. Returns its time and how many subscribers there are. Raises UnknownDefinition.

        `window` is what was asked for; `window_ms` and `delay_ms` are as of `Opening`, `note` says why they are. With an
        `idempotency_key` that was used for the definition before, it is the occurrence of then.
        """
        asked = milliseconds(window)
        used = asked if window_ms is None else window_ms
        now_ms = self.now_ms()
        answer = self._scripts.run("trigger", definition, asked, actor, self._log_size, now_ms, used, delay_ms, note, idempotency_key)
        at_ms, subscribers = answer
        if at_ms == -1:
            raise UnknownDefinition(f"no definition {definition!r} is published")
        return at_ms, subscribers

    def occurrences(self, definition: str, *, since_ms: int = 0, limit: int = 100) -> list[Occurrence]:
        """The newest first."""
        ids = cast(
            "list[str]",
            self._redis.zrange(self._key("occurrences", definition), "+inf", since_ms, byscore=True, desc=True, offset=0, num=limit),
        )
        pipe = self._redis.pipeline(transaction=False)
        for oid in ids:
            pipe.hgetall(self._key("occurrence", oid))
        return [read_occurrence(oid, fields) for oid, fields in zip(ids, pipe.execute(), strict=True) if fields]

    # jobs

    def enqueue(self, jobs: Sequence[Enqueue]) -> list[bool]:
        """Make jobs by hand: whether each was new. A batch of 500 is made as one, or not at all.

        Raises UnknownUser or UnknownDefinition.
        """
        made: list[bool] = []
        for batch in batches(jobs, _BATCH):
            args: list[str] = []
            for job in batch:
                after = str(job.execute_after_ms) if job.execute_after_ms is not None else f"+{job.delay_ms}"
                args += [job.id, job.priority or "", after, _to_json(job.params) if job.params else "", job.source]
            answer = self._scripts.run("enqueue", *args)
            if answer[0] < 0:
                definition, user, _ = batch[int(answer[1])].id.split(":", 2)
                raise _no_user(user) if answer[0] == -1 else UnknownDefinition(f"no definition {definition!r} is published")
            made += [bool(one) for one in answer[2:]]
        return made

    def release(self, *, limit: int = 100) -> tuple[int, int | None]:
        """Release what is due. Returns how many jobs, and in how many ms the next could go (None: unknown)."""
        released, wait, _ = self._scripts.run("release", limit)
        return released, int(wait) if wait else None

    def start(self, job_id: str, *, delivery: int, worker: str, waited_ms: int = 0, version: str = "") -> Start:
        """Let a delivery run, if it is the job's current one. `version` is that of the definition by which it will."""
        answer = self._scripts.run("start", job_id, delivery, worker, waited_ms, secrets.token_hex(8), version)
        if answer[0] != "run":
            return Start(go=False, refusal=answer[0])
        _, attempt, losses, after, params, budget, now = answer
        return Start(
            go=True,
            attempt=attempt,
            losses=losses,
            execute_after_ms=int(after),
            params=json.loads(params) if params else {},
            failures=attempt - 1 - budget,
            now_ms=now,
        )

    def refuse(self, job_id: str, *, delivery: int, worker: str, why: str) -> str:
        """Give a delivery back that this worker cannot take; another may. After 20 times the job is rejected.

        Returns "given back", "rejected", the job's state when the delivery no longer counts, or "unknown".
        """
        return str(self._scripts.run("refuse", job_id, delivery, worker, why, milliseconds(_REFUSED_FOR), _MOST_REFUSALS))

    def renew(self, job_id: str, *, delivery: int, worker: str) -> Renewal:
        """Ask whether a run that was held up between its start and its call may still make it."""
        answer = self._scripts.run("renew", job_id, delivery, worker, _MOST_GIVEN_BACK, secrets.token_hex(8))
        return {"go": Renewal.IN_TIME, "free": Renewal.ANY_TIME}.get(answer, Renewal.NEVER)

    def finish(
        self,
        job_id: str,
        *,
        delivery: int,
        worker: str,
        state: JobState,
        reason: str,
        detail: Mapping[str, Any] | None = None,
        retry_in: timedelta | None = None,
        call: CallReport | None = None,
        late: bool = False,
    ) -> bool:
        """End a run. False when the delivery no longer counted; its result is then only noted in the history.

        `call` says how the host did that the run called, if it did; `late` that a time limit ended a run that is tried again. Raises
        InvalidTransition for a state in which no run ends.
        """
        if state not in TRANSITIONS[JobState.RUNNING]:
            raise InvalidTransition(f"a run of {job_id} cannot end as {state}: {', '.join(sorted(TRANSITIONS[JobState.RUNNING]))} it can")
        delay = milliseconds(retry_in) if retry_in is not None else 0
        verdict = "" if call is None else "bad" if call.failed else "good"
        pause = 0 if call is None else milliseconds(call.pause)
        rule, host = ("", "") if call is None else (write_rule(call.rule), call.host)
        told = _to_json(detail) if detail else ""
        answer, of_host = self._scripts.run(
            "finish", job_id, delivery, worker, state, reason, told, delay, verdict, pause, rule, host, int(late)
        )
        if of_host:
            log.warning("%s", of_host)
        return bool(answer == "done")

    def lose(self, job_id: str, *, delivery: int, worker: str, what: str, max_losses: int, backoff: timedelta, stuck: bool = False) -> bool:
        """The process that ran a delivery died, or the run is `stuck` and the worker shall stop it.

        False when the delivery no longer counted.
        """
        return bool(self._scripts.run("lose", job_id, delivery, worker, what, max_losses, milliseconds(backoff), int(stuck)))

    def cancel(self, job_id: str, *, reason: str, delivery: int | None = None) -> JobState:
        """Cancel a job that is not finished; with `delivery`, only if that is its current one.

        Returns the state that it was in. Raises UnknownJob.
        """
        return self._state(self._scripts.run("cancel", job_id, reason, "" if delivery is None else delivery), job_id)

    def prioritize(self, job_id: str, priority: Priority, *, reason: str) -> JobState:
        """Give a job that waits another priority. Returns the state that it is in; one that does not wait stays as it is.

        Raises UnknownJob.
        """
        return self._state(self._scripts.run("prioritize", job_id, priority, reason), job_id)

    def behind(self) -> dict[str, Priority]:
        """Definitions whose waiting jobs do not all have the priority yet that was published last."""
        return {name: Priority(text) for name, text in cast("dict[str, str]", self._redis.hgetall(self._key("following"))).items()}

    def follow_priority(self, definition: str, priority: Priority, *, confirm: Callable[[], object] = lambda: None) -> int:
        """Give what waits of a definition its new priority, but for jobs that were given one of their own. Returns how many.

        `confirm` is called before each batch: a million jobs take half a minute.
        """
        total = 0
        for former in [one for one in Priority if one is not priority]:
            for turns in (0, 1):
                looked, kept = _BATCH, 0
                while looked == _BATCH:
                    confirm()
                    looked, changed = self._scripts.run("follow", definition, former, turns, kept, _BATCH)
                    kept += looked - changed
                    total += changed
        self._scripts.run("follow", definition, priority, 0, 0, 0)
        return total

    def retry(self, job_id: str, *, reason: str) -> JobState:
        """Run a job again that ended without success. One that was retried and has not ended badly since stays as it is.

        Returns the state that it was in. Raises UnknownJob, Conflict, and UnknownDefinition when its definition was removed.
        """
        before = self._retried(job_id, self._retry([job_id], reason, dead=False)[0])
        if before not in (JobState.FAILED, JobState.TIMED_OUT, JobState.CANCELED, JobState.REJECTED):
            raise Conflict(f"job {job_id} is {before}: only a failed, timed_out, canceled or rejected job can be retried")
        return before

    def _retry(self, ids: Sequence[str], reason: str, *, dead: bool) -> list[str]:
        """What the script says of each; with `dead` only dead letters are retried."""
        return cast("list[str]", self._scripts.run("retry", reason, int(dead), secrets.token_hex(8), *ids))

    def _retried(self, job_id: str, answer: str) -> JobState:
        if answer == "removed":
            definition = job_id.partition(":")[0]
            raise UnknownDefinition(f"job {job_id} cannot run again: its definition {definition!r} was removed from the catalogue")
        return self._state(answer, job_id)

    @staticmethod
    def _state(answer: str, job_id: str) -> JobState:
        if answer == "unknown":
            raise UnknownJob(f"no job {job_id!r}: it never was, or its record is past the retention")
        return JobState(answer)

    # dead letters

    def dead_letters(
        self,
        *,
        definition: str | None = None,
        user: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        reason: str = "",
        cursor: str | None = None,
        limit: int = 100,
        scan: int | None = None,
    ) -> Page[Job]:
        """Jobs that died, by when, the newest first; with `reason`, those whose reason contains it.

        Paging is stable while jobs die and are redriven or discarded. `scan` is as of `jobs`.
        """
        upper, last_seen = _place(cursor, until_ms)
        found: list[Job] = []
        looked = 0
        while rows := self._newest([self._key("dead")], (), since_ms or 0, upper, last_seen, max(limit, _BATCH)):
            looked += len(rows)
            wanted = [job_id for _, job_id in rows if _is_of(job_id, definition, user)]
            for job in self._jobs(wanted):
                # one that was redriven just now is no dead letter any more
                if job.finished_ms is not None and reason in job.reason:
                    found.append(job)
                    if len(found) == limit:
                        return Page(tuple(found), f"{job.finished_ms}|{job.id}")
            last_seen = rows[-1]
            upper = last_seen[0]
            if scan is not None and looked >= scan:
                return Page(tuple(found), f"{last_seen[0]}|{last_seen[1]}")
        return Page(tuple(found), None)

    def redrive(self, ids: Sequence[str], *, reason: str) -> list[DeadLetterResult]:
        """Run dead letters again, each with a fresh budget of retries and losses and under its old id."""
        answers: list[DeadLetterResult] = []
        for batch in batches(ids, 100):
            # else it is the state in which it died
            answers += [_DEAD_LETTER_RESULTS.get(answer, DeadLetterResult.DONE) for answer in self._retry(batch, reason, dead=True)]
        return answers

    def discard(self, ids: Sequence[str], *, actor: str, subject: str, detail: str) -> list[DeadLetterResult]:
        """Forget dead letters now, with an entry in the change log about `subject` for each 100."""
        answers: list[DeadLetterResult] = []
        for batch in batches(ids, 100):
            found = self._scripts.run("discard", actor, self._log_size, subject, detail, *batch)
            answers += [_DEAD_LETTER_RESULTS.get(answer, DeadLetterResult.DONE) for answer in found]
        return answers

    def note(self, job_id: str, *, worker: str, text: str) -> None:
        """Add a line to a job's history."""
        self._scripts.run("note", job_id, worker, text)

    def job(self, job_id: str) -> Job:
        """Raises UnknownJob."""
        found = self._jobs([job_id])
        if not found:
            self._state("unknown", job_id)
        return found[0]

    def jobs_by_id(self, ids: Sequence[str]) -> list[Job]:
        """Those that exist, in this order."""
        return [job for batch in batches(ids, 1000) for job in self._jobs(batch)]

    def _jobs(self, ids: Sequence[str]) -> list[Job]:
        pipe = self._redis.pipeline(transaction=False)
        for job_id in ids:
            # the packed record first: whose job gets a record of its own meanwhile is then found there
            pipe.hget(*self._packed(job_id))
            pipe.hgetall(self._key("job", job_id))
            pipe.lindex(self._key("history", job_id), -1)
        found: list[Job] = []
        for job_id, (packed, fields, last) in zip(ids, batches(pipe.execute(), 3), strict=True):
            if fields:
                found.append(read_job(job_id, fields, last))
            elif packed:
                found.append(read_job(job_id, read_packed(packed), None))
        return found

    def _packed(self, job_id: str) -> tuple[str, str]:
        """Key and field of a job's packed record."""
        definition, _, rest = job_id.partition(":")
        user, _, suffix = rest.partition(":")
        return self._key("planned", f"{definition}:{suffix}"), user

    def history(self, job_id: str) -> list[Transition]:
        """From the first transition to the last. Raises UnknownJob."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.hget(*self._packed(job_id))
        pipe.hgetall(self._key("job", job_id))
        pipe.lrange(self._key("history", job_id), 0, -1)
        packed, fields, rows = pipe.execute()
        if not fields and not packed:
            self._state("unknown", job_id)
        record = fields or read_packed(packed)
        return [read_creation(int(record["made"]), record["source"]), *map(read_transition, rows)]

    def jobs(
        self,
        *,
        user: str | None = None,
        definition: str | None = None,
        states: frozenset[JobState] = frozenset(),
        since_ms: int | None = None,
        until_ms: int | None = None,
        cursor: str | None = None,
        limit: int = 100,
        scan: int | None = None,
    ) -> Page[Job]:
        """Jobs by when they were made, the newest first; paging is stable while jobs come and go.

        `user` or `definition` makes it quick; without either, all definitions are merged. With `scan`, about so many jobs are looked at,
        at the most: a page may then be short, or empty, and yet have a cursor.
        """
        packed: list[tuple[int, str]] = []
        if user is not None:
            # before the index: what gets a record of its own meanwhile is then found there, and at worst in both
            packed = self._packed_jobs(user)
            indexes = [self._key("user_jobs", user)]
        else:
            names = [definition] if definition is not None else sorted(self.published())
            indexes = [self._key("definition_jobs", name) for name in names]
        upper, last_seen = _place(cursor, until_ms)
        found: list[Job] = []
        looked = 0
        while True:
            rows = self._newest(indexes, packed, since_ms or 0, upper, last_seen, limit)
            if not rows:
                return Page(tuple(found), None)
            looked += len(rows)
            for job in self._jobs([job_id for _, job_id in rows]):
                if (not states or job.state in states) and (definition is None or job.definition == definition):
                    found.append(job)
                    if len(found) == limit:
                        return Page(tuple(found), f"{job.created_ms}|{job.id}")
            last_seen = rows[-1]
            upper = last_seen[0]
            if scan is not None and looked >= scan:
                return Page(tuple(found), f"{last_seen[0]}|{last_seen[1]}")

    def _packed_jobs(self, user: str) -> list[tuple[int, str]]:
        """(created, id) of the user's jobs that are not in the user's index."""
        return [(int(made), job_id) for job_id, made in batches(self._scripts.run("list_packed", user), 2)]

    def _newest(
        self, indexes: Sequence[str], more: Sequence[tuple[int, str]], lower: int, upper: int, after: tuple[int, str] | None, limit: int
    ) -> list[tuple[int, str]]:
        """(created, id) in the indexes and in `more`, newest first, that come after `after` in that order."""
        more = [row for row in more if lower <= row[0] <= upper]
        count = limit
        while True:
            pipe = self._redis.pipeline(transaction=False)
            for index in indexes:
                pipe.zrange(index, upper, lower, byscore=True, desc=True, withscores=True, offset=0, num=count)
            pages = cast("list[list[tuple[str, float]]]", pipe.execute())
            rows = sorted({*more, *((int(score), member) for page in pages for member, score in page)}, reverse=True)
            # where a page was cut off there may be more, and what the others have beyond that comes after it
            cut = max(((int(page[-1][1]), page[-1][0]) for page in pages if len(page) == count), default=(-1, ""))
            rows = [row for row in rows if row >= cut and (after is None or row < after)]
            if rows or cut == (-1, ""):
                return rows[:limit]
            count *= 4

    def counts(self) -> dict[JobState, int]:
        """How many jobs ever entered each state."""
        return read_counts(cast("dict[str, str]", self._redis.hgetall(self._key("counts"))))

    def waiting(self) -> dict[Priority, int]:
        """How many jobs wait, by priority; held ones are not counted."""
        published = sorted(self.published())
        capped = sorted(cast("set[str]", self._redis.smembers(self._key("capped_users"))))
        pipe = self._redis.pipeline(transaction=False)
        places = [(priority, lane, part) for priority in Priority for lane in ("lane", "turn") for part in published]
        places += [(priority, "capped", user) for priority in Priority for user in capped]
        for priority, lane, part in places:
            pipe.zcard(self._key(lane, f"{priority}:{part}"))
        totals = dict.fromkeys(Priority, 0)
        for (priority, _, _), count in zip(places, pipe.execute(), strict=True):
            totals[priority] += count
        return totals

    def queued(self) -> dict[Priority, int]:
        """How many jobs are released and not started, by priority."""
        return {priority: self._redis.zcard(self._key("queued", priority)) for priority in Priority}

    def running(self) -> int:
        """How many jobs run."""
        return self._redis.zcard(self._key("active"))

    # limits

    def limits(self) -> dict[str, Limit]:
        """Those in force, by name."""
        raw = cast("dict[str, str]", self._redis.hgetall(self._key("limits")))
        return {name: read_limit(text) for name, text in sorted(raw.items())}

    def limit_states(self, *, of_users: bool = True) -> list[LimitState]:
        """Those in force with how they stand, by name, and the hosts that are held back; without `of_users` none that is of one user."""
        pipe = self._redis.pipeline(transaction=True)
        for name in ("limits", "limits_live", "limits_configured", "inflight", "breakers"):
            pipe.hgetall(self._key(name))
        limits, live, configured, in_flight, breakers = pipe.execute()
        wanted = {name for name in limits if of_users or not name.startswith("user:")}
        names = sorted(wanted | {f"host:{host}" for host in breakers})
        for name in names:
            pipe.get(self._key("limit", name))
        buckets = dict(zip(names, pipe.execute(), strict=True))
        now_ms = self.now_ms()
        users = [count for name, count in in_flight.items() if name.startswith("user:")]
        states = []
        for name in names:
            limit = read_limit(limits[name]) if name in limits else Limit()
            record = breakers.get(name.removeprefix("host:")) if name.startswith("host:") else None
            tokens, reserved = _bucket(buckets[name], limit, now_ms)
            flying = max(map(int, users), default=0) if name == "user" else int(in_flight.get(name, 0))
            states.append(
                LimitState(
                    name=name,
                    limit=limit,
                    configured=read_limit(configured[name]) if name in configured else None,
                    live=name in live,
                    tokens=tokens,
                    reserved=reserved,
                    in_flight=None if limit.concurrency is None else flying,
                    held_until_ms=read_breaker(name, record, now_ms).until_ms if record else None,
                )
            )
        return states

    def set_limit(self, name: str, limit: Limit, *, actor: str, configured: bool = False) -> bool:
        """Set a limit for all workers, at once; a live one wins over what is configured. Returns whether that changed what is in force."""
        return self._limit(name, write_limit(limit), actor, configured)

    def reset_limit(self, name: str, *, actor: str, configured: bool = False) -> bool:
        """Take a live limit away: what is configured is in force again. Returns whether that changed something."""
        return self._limit(name, "", actor, configured)

    def _limit(self, name: str, value: str, actor: str, configured: bool, term: int | None = None) -> bool:
        layer, since = "configured" if configured else "live", "" if term is None else term
        changed = self._led(self._scripts.run("limit", name, layer, value, actor, self._log_size, since))
        if name.startswith("user"):
            # also where nothing changed: the call may be a repeated one
            while self._scripts.run("uncap", _BATCH):
                pass
        return changed

    def configure_limits(self, limits: Mapping[str, Limit], *, actor: str, term: int | None = None) -> None:
        """What the settings say of limits that are no definition's, all of them. With `term`, raises Conflict as `publish` does."""
        known = cast("list[str]", self._redis.hkeys(self._key("limits_configured")))
        for name in known:
            if not name.startswith("definition:") and name not in limits:
                self._limit(name, "", actor, True, term)
        for name, limit in limits.items():
            self._limit(name, write_limit(limit), actor, True, term)

    def set_options(self, *, fairness: bool, share: float, term: int | None = None, retention: timedelta | None = None) -> None:
        """How jobs are released: with turns for the users inside a priority, and what part of all releases each lower one gets.

        `retention` is how long finished jobs are kept, for the scripts that keep changes as long; None leaves it as it is. With
        `term`, raises Conflict as `publish` does.
        """
        moved, since = _BATCH, "" if term is None else term
        kept = "" if retention is None else milliseconds(retention)
        while moved == _BATCH:
            moved = self._scripts.run("options", int(fairness), repr(share), _BATCH, since, kept)
            self._led(moved)

    # hosts

    def breakers(self) -> list[Breaker]:
        """Of the hosts that published definitions call, and of others that are held back; in order of their names."""
        pipe = self._redis.pipeline(transaction=False)
        for definition in sorted(self.published()):
            pipe.hget(self._key("definition", definition), "host")
        return self._breakers({host for host in pipe.execute() if host})

    def _breakers(self, hosts: Iterable[str]) -> list[Breaker]:
        """Of these hosts, and of others that are held back."""
        held, now_ms = cast("dict[str, str]", self._redis.hgetall(self._key("breakers"))), self.now_ms()
        pipe = self._redis.pipeline(transaction=False)
        well = sorted(set(hosts) - held.keys())
        for host in well:
            pipe.get(self._key("calls", host))
        found = [read_calls(host, counted) for host, counted in zip(well, pipe.execute(), strict=True)]
        found += [read_breaker(host, record, now_ms) for host, record in held.items()]
        return sorted(found, key=lambda one: one.host)

    def breaker_of(self, definition: str) -> Breaker | None:
        """Of the host that a definition calls, if that is held back."""
        host = self._redis.hget(self._key("definition", definition), "host")
        record = self._redis.hget(self._key("breakers"), host) if host else None
        return read_breaker(cast("str", host), cast("str", record), self.now_ms()) if record else None

    def hold_host(self, host: str, *, span: timedelta, why: str, actor: str) -> None:
        """Nothing goes to the host for so long. Then it is probed, as after failures."""
        self._scripts.run("hold_host", host, milliseconds(span), why, actor, self._log_size, secrets.token_hex(8))

    def free_host(self, host: str, *, actor: str) -> bool:
        """Hold a host back no longer, and probe it no more. Returns whether it was held back."""
        return bool(self._scripts.run("hold_host", host, 0, "", actor, self._log_size, ""))

    def sizes(self, groups: Sequence[tuple[str, str]]) -> list[int]:
        """How many subscribers an occurrence of (group, its definition) has; none while the definition is paused."""
        pipe = self._redis.pipeline(transaction=False)
        for gid, definition in groups:
            pipe.zcard(self._key("slots", gid))
            pipe.hexists(self._key("definition", definition), "paused")
        return [0 if paused else size for size, paused in batches(pipe.execute(), 2)]

    def commitments(self, *, horizon: timedelta) -> list[Commitment]:
        """What limits must carry already: what is to come of open occurrences, and what is due and waits."""
        now_ms, horizon_ms = self.now_ms(), milliseconds(horizon)
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._key("committed"))
        for priority in Priority:
            pipe.zrange(self._key("ready", priority), "-inf", now_ms, byscore=True)
            pipe.zrange(self._key("blocked", priority), "-inf", "(inf", byscore=True)
            pipe.zrange(self._key("turns", priority), 0, -1)
        committed, *lanes = pipe.execute()
        waiting = [
            (priority, definition)
            for priority, indexes in zip(Priority, batches(lanes, 3), strict=True)
            for definition in dict.fromkeys(definition for index in indexes for definition in index)
        ]
        for priority, definition in waiting:
            pipe.zcount(self._key("lane", f"{priority}:{definition}"), "-inf", now_ms)
            pipe.zcard(self._key("turn", f"{priority}:{definition}"))
        if committed:
            pipe.zmscore(self._key("due"), [f"o|{oid}" for oid in committed])
        answers = pipe.execute()
        dues = answers.pop() if committed else ()
        found = [
            Commitment(definition, priority, now_ms, now_ms, due + taking_turns)
            for (priority, definition), (due, taking_turns) in zip(waiting, batches(answers, 2), strict=True)
            if due + taking_turns
        ]
        for (oid, text), due_ms in zip(committed.items(), dues, strict=True):
            next_ms = None if due_ms is None else due_ms + horizon_ms
            found.append(read_commitment(oid, text, now_ms=now_ms, next_ms=next_ms, patience_ms=horizon_ms))
        return found

    # workers

    def heartbeat(
        self,
        worker: str,
        *,
        slots: int,
        queues: Sequence[str],
        buffer: float,
        drained: bool = False,
        info: Mapping[str, str] | None = None,
    ) -> Orders:
        """A worker lives; `drained` says whether it was told to take nothing new. Returns what it shall do.

        The runs that it shall stop are the same ones each time, until it tells of them by `stopped`.
        """
        extra = [part for pair in (info or {}).items() for part in pair]
        told, *flat = self._scripts.run("heartbeat", worker, slots, ",".join(queues), buffer, int(drained), *extra)
        stops = ((run.rpartition("#"), why) for run, why in batches(flat, 2))
        return Orders(tuple(Stop(job_id, int(delivery), why) for (job_id, _, delivery), why in stops), told == "1")

    def drain_worker(self, worker: str, *, actor: str) -> bool:
        """Let a worker take nothing new until it is resumed or ends. Returns whether that changed something. Raises UnknownWorker."""
        return self._drain(worker, 1, actor)

    def resume_worker(self, worker: str, *, actor: str) -> bool:
        """The reverse. Raises UnknownWorker."""
        return self._drain(worker, 0, actor)

    def _drain(self, worker: str, drain: int, actor: str) -> bool:
        answer = self._scripts.run("drain", worker, drain, actor, self._log_size)
        if answer == -1:
            raise UnknownWorker(f"no worker {worker!r}: it never was, or it has ended")
        return bool(answer)

    def stopped(self, worker: str, stop: Stop, *, note: str = "", discarded: bool = False) -> bool:
        """A worker did what it can about a run that it was to stop. The `note` goes into the job's history.

        `discarded`: with that the run is over, and no result of it will come. False when the worker had told of it before.
        """
        return bool(self._scripts.run("stopped", worker, stop.job_id, stop.delivery, note, int(discarded)))

    def withdraw(self, worker: str, deliveries: Iterable[str], *, also_running: bool = False) -> int:
        """A worker that stops gives back deliveries (`<job>#<number>`) that it has not started, or also such as run. Returns how many."""
        return int(self._scripts.run("withdraw", worker, "1" if also_running else "", *deliveries))

    def leave(self, worker: str, deliveries: Iterable[str] = ()) -> int:
        """A worker has stopped: what it runs is given back, and what it holds of these. Returns how many."""
        return int(self._scripts.run("leave", worker, *deliveries))

    def recover(
        self, worker: str, *, seen_ms: int, how: str, max_losses: int, backoff: timedelta, limit: int = 500
    ) -> list[tuple[str, str]]:
        """Take the jobs of a worker that is lost, if its last heartbeat is still the one that was seen.

        Returns ("job" or "worker", id) for each; without the worker there may be more to take.
        """
        rows = self._scripts.run("recover", worker, seen_ms, how, max_losses, milliseconds(backoff), limit)
        return [(kind, name) for kind, name in rows]

    def reclaim(self, *, patience: timedelta, limit: int = 200, clock_set: bool = False) -> list[str]:
        """Release again what was queued for longer than `patience` and whose message is nowhere. Returns the ids.

        `clock_set`: the server's clock was set since the caller's last look, so that nobody knows yet how long anything was queued.
        """
        return cast("list[str]", self._scripts.run("reclaim", milliseconds(patience), limit, int(clock_set)))

    def heads(self, queues: Sequence[str]) -> dict[str, str]:
        """By queue, a mark of the message that is next in it. Empty queues are left out."""
        marks = self._scripts.run("heads", *queues)
        return {queue: mark for queue, mark in zip(queues, marks, strict=True) if mark}

    def running_on(self, worker: str) -> set[str]:
        """Ids of the jobs that the worker runs, as far as it is recorded."""
        return cast("set[str]", self._redis.smembers(self._key("worker_jobs", worker)))

    def heartbeats(self) -> dict[str, int]:
        """By worker, when it last said that it lives, by the server's clock at that time."""
        return {
            worker: int(at)
            for worker, at in cast("list[tuple[str, float]]", self._redis.zrange(self._key("workers"), 0, -1, withscores=True))
        }

    def worker_info(self, workers: Sequence[str]) -> list[dict[str, str]]:
        """What each of them said of itself with its heartbeats; nothing of one that is not known."""
        pipe = self._redis.pipeline(transaction=False)
        for worker in workers:
            pipe.hgetall(self._key("worker", worker))
        return cast("list[dict[str, str]]", pipe.execute())

    def workers(self) -> list[Worker]:
        """In order of their ids."""
        rows = cast("list[tuple[str, float]]", self._redis.zrange(self._key("workers"), 0, -1, withscores=True))
        pipe = self._redis.pipeline(transaction=False)
        for worker, _ in rows:
            pipe.hgetall(self._key("worker", worker))
            pipe.smembers(self._key("worker_jobs", worker))
        answers = batches(pipe.execute(), 2)
        return sorted(
            (read_worker(worker, int(beat), fields, jobs) for (worker, beat), (fields, jobs) in zip(rows, answers, strict=True)),
            key=lambda one: one.id,
        )

    # what is no message

    def set_aside(self, queue: str, message: bytes | str, *, reason: str, worker: str) -> None:
        """Keep the beginning of what came out of a queue and no worker can take; the newest 1000 are kept. It is counted."""
        data = message.encode("utf-8", "backslashreplace") if isinstance(message, str) else message
        text = data.decode("utf-8", "backslashreplace").encode()[:_MOST_GARBAGE_BYTES].decode("utf-8", "ignore")
        self._scripts.run("set_aside", queue, reason, worker, text, _MOST_GARBAGE)

    def garbage(self, *, limit: int = 100) -> list[Garbage]:
        """What was set aside, the newest first."""
        rows = cast("list[tuple[str, dict[str, str]]]", self._redis.xrevrange(self._key("garbage"), count=limit))
        return [Garbage(int(row["at"]), row["queue"], row["reason"], row["worker"], row["text"]) for _, row in rows]

    def clear_garbage(self) -> int:
        """Forget what was set aside. Returns how many. The counter stays."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.xlen(self._key("garbage"))
        pipe.delete(self._key("garbage"))
        return int(pipe.execute()[0])

    # health

    def vitals(self) -> Vitals:
        """What health is judged by, in three round trips."""
        now_ms = self.now_ms()
        pipe = self._redis.pipeline(transaction=False)
        pipe.info()
        pipe.hgetall(self._key("planner"))
        # a group that was made just now has 0
        pipe.zrange(self._key("due"), "(0", "+inf", byscore=True, withscores=True, offset=0, num=1)
        pipe.zrange(self._key("workers"), 0, -1, withscores=True)
        pipe.smembers(self._key("definitions"))
        pipe.zcard(self._key("active"))
        pipe.zrange(self._key("active"), 0, 999, withscores=True)
        pipe.zcard(self._key("dead"))
        pipe.hgetall(self._key("counters"))
        pipe.hget(self._key("limits"), "total")
        pipe.get(self._key("limit", "total"))
        pipe.hgetall(self._key("capacity"))
        pipe.hgetall(self._key("breakers"))
        for priority in Priority:
            pipe.zrange(self._key("ready", priority), 0, 0, withscores=True)
            pipe.zcard(self._key("queued", priority))
            pipe.zrange(self._key("queued", priority), 0, 0, withscores=True)
            pipe.llen(str(priority))
        info, planner, due, beats, known, running, runs, dead, counters, total, bucket, capacity, held, *rest = pipe.execute()
        definitions = sorted(known)
        for worker, _ in beats:
            pipe.hgetall(self._key("worker", worker))
            pipe.scard(self._key("worker_jobs", worker))
        for definition in definitions:
            pipe.hmget(self._key("definition", definition), "paused", "timeout")
        answers = pipe.execute()
        of_workers = list(zip(beats, batches(answers[: 2 * len(beats)], 2), strict=True))
        of_definitions = list(zip(definitions, answers[2 * len(beats) :], strict=True))
        tokens = None if total is None else _bucket(bucket, read_limit(total), now_ms)[0]
        return Vitals(
            now_ms=now_ms,
            server={str(name): str(value) for name, value in info.items()},
            planner=planner,
            oldest_due_ms=int(due[0][1]) if due else None,
            workers=tuple(read_worker(worker, int(beat), fields, ()) for (worker, beat), (fields, _) in of_workers),
            running_on={worker: count for (worker, _), (_, count) in of_workers},
            queues=read_queues(capacity, dict(zip(Priority, batches(rest, 4), strict=True))),
            total_has_room=tokens is None or tokens >= 1,
            running=running,
            oldest_runs=tuple((job_id, int(started)) for job_id, started in runs),
            timeouts_ms={definition: int(timeout) for definition, (_, timeout) in of_definitions if timeout},
            paused={definition: why for definition, (why, _) in of_definitions if why},
            dead_letters=dead,
            counters={name: int(times) for name, times in counters.items()},
            breakers=tuple(read_breaker(host, record, now_ms) for host, record in sorted(held.items())),
        )

    # calls of the control API that are made once

    def claim_answer(self, digest: str, claim: str, *, hold: timedelta) -> str | None:
        """Be the one who answers a caller's key. None: it is; else what lies under the key, this or another's claim or an answer.

        The claim ends after `hold`, should whoever made it never come back. `claim` must be unlike any other.
        """
        before = self._redis.set(self._key("answer", digest), claim, nx=True, get=True, px=milliseconds(hold))
        # a claim that was sent again because its answer was lost finds itself
        return None if before is None or before == claim else cast("str", before)

    def keep_answer(self, digest: str, answer: str, *, retention: timedelta) -> None:
        """Keep what was answered to a caller's key."""
        self._redis.set(self._key("answer", digest), answer, px=milliseconds(retention))

    def forget_answer(self, digest: str) -> None:
        """Let the caller's key be used again: nothing came of it."""
        self._redis.delete(self._key("answer", digest))

    # metrics

    def outlook(self, *, horizon: timedelta, until_ms: int) -> Outlook:
        """What a forecast up to `until_ms` begins with."""
        limits = self.limit_states(of_users=False)
        return read_outlook(self._redis, self._key, self.now_ms(), limits, horizon_ms=milliseconds(horizon), until_ms=until_ms)

    def figures(self) -> Figures:
        """What metrics are made of, in some ten round trips. Its cost grows with the definitions, the limits and the jobs that run."""
        return read_figures(self._redis, self._key, self.now_ms(), self.limit_states(of_users=False), self.jobs_by_id, self._breakers)

    # housekeeping

    def sweep(
        self,
        *,
        retention: timedelta,
        dead_retention: timedelta = timedelta(days=14),
        dead_max: int = 100_000,
        limit: int = 500,
    ) -> int:
        """Forget what ended longer ago than that, at most `limit` of each kind. Returns how many; 0 when nothing is left.

        Dead letters have a retention of their own, and the oldest go where there are more than `dead_max`.
        """
        return int(self._scripts.run("sweep", milliseconds(retention), milliseconds(dead_retention), dead_max, limit))

    def changes(self, *, about: Sequence[str] = (), limit: int = 100) -> list[Change]:
        """The change log, the newest first; with `about`, what names all of these users or definitions."""
        found: list[Change] = []
        end = "+"
        while len(found) < limit:
            rows = cast("list[tuple[str, dict[str, str]]]", self._redis.xrevrange(self._key("changes"), max=end, count=1000))
            for _, row in rows:
                if set(about) <= set(row["subject"].split()):
                    found.append(Change(int(row["at"]), row["actor"], row["kind"], row["subject"], row["detail"]))
            if len(rows) < 1000:
                break
            end = f"({rows[-1][0]}"
        return found[:limit]

    def _log(self, actor: str, kind: str, subject: str, detail: str) -> None:
        entry = {"at": str(self.now_ms()), "actor": actor, "kind": kind, "subject": subject, "detail": detail}
        self._redis.xadd(self._key("changes"), cast("Any", entry), maxlen=self._log_size)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _bucket(kept: str | None, limit: Limit, now_ms: int) -> tuple[float | None, int]:
    """Free tokens and reserved ones, as lib.lua counts them."""
    if limit.per_second is None:
        return None, 0
    if kept is None:
        return limit.capacity / limit.tokens_per_start, 0
    at_ms, level, reserved = kept.split()
    filled = min(limit.capacity, float(level) + max(0, now_ms - int(at_ms)) * limit.per_second / 1000)
    return filled / limit.tokens_per_start - int(reserved), int(reserved)


def _place(cursor: str | None, until_ms: int | None) -> tuple[int, tuple[int, str] | None]:
    """Where a listing of jobs by time, the newest first, goes on: the latest instant, and the last that it gave."""
    upper = until_ms if until_ms is not None else 1 << 53
    if not cursor:
        return upper, None
    at, _, job_id = cursor.partition("|")
    # 16 digits are more than any instant has, and fewer than Redis takes
    if not (at.isascii() and at.isdigit() and len(at) <= 16 and job_id):
        raise InvalidInput(f"cursor {cursor!r} is not one that a listing gave", field="cursor")
    return min(upper, int(at)), (int(at), job_id)


def _is_of(job_id: str, definition: str | None, user: str | None) -> bool:
    """Whether a job is of the definition and of the user, where these are given."""
    of, owner, _ = job_id.split(":", 2)
    return definition in (None, of) and user in (None, owner)


def _no_user(user: str) -> UnknownUser:
    return UnknownUser(f"no user {user!r}")


#: One for all: json.dumps makes an encoder for each call that is not like the last.
_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
