"""Looking ahead: from what the store knows now to a forecast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from taskplatform.errors import InvalidInput
from taskplatform.fluid import Pool
from taskplatform.forecast.evaluation import backlogs, busy_slots, limit_text, limit_uses, spans, tracks, widenings
from taskplatform.forecast.measures import ASSUMED_SECONDS, Source, measure
from taskplatform.forecast.result import Cost, Forecast, Slots, Track
from taskplatform.forecast.simulation import Added, Simulation
from taskplatform.model import Definition, Limit, Priority
from taskplatform.settings import Settings
from taskplatform.store import BackfillState, Outlook, Store
from taskplatform.windows import limit_of

#: The longest forecast.
MOST_HOURS = 168.0
#: With a minute each; longer forecasts have longer bins.
_MOST_BINS = 48 * 60
_MINUTE_MS = 60_000
_MOST_USERS = 100_000_000
_MOST_NAMED = 10


def look_ahead(
    store: Store,
    catalogue: Mapping[str, Definition],
    settings: Settings,
    *,
    hours: float = 24,
    enable: Sequence[Added] = (),
    limits: Mapping[str, Limit] | None = None,
    slots: int | None = None,
    came: Sequence[Added] = (),
    resume: Sequence[str] = (),
) -> Forecast:
    """What the next hours bring, as things are, or with what is asked for beside that.

    `enable` are more subscribers; `came` those who just came, without whom things were before. `limits` go before those in force, each as a
    whole; one without rate and concurrency is none. `slots` is how many places workers have; without it those of the workers that live.
    `resume` are definitions that are not paused any more.

    Raises InvalidInput, StoreError.
    """
    if not isinstance(hours, int | float) or isinstance(hours, bool) or not 0 < hours <= MOST_HOURS:
        raise InvalidInput(f"hours {hours!r} is not accepted: more than 0 and up to {MOST_HOURS:g} is", field="hours")
    if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or not 0 <= slots <= 1_000_000):
        raise InvalidInput(f"slots {slots!r} is not accepted: 0 to 1,000,000 is", field="slots")
    for one in (*enable, *came):
        _check(one, catalogue)
    if unknown := [name for name in resume if name not in catalogue]:
        raise InvalidInput(f"definition {unknown[0]!r} is not known; `taskplatform tasks list` shows all", field="resume")
    for name in limits or {}:
        if name.partition(":")[0] not in ("total", "definition", "host"):
            raise InvalidInput(f"limit {name!r} cannot be forecast: total, definition:ID and host:HOST can", field="limits")
    span_ms = max(_MINUTE_MS, round(hours * 3_600_000))
    bin_ms = _MINUTE_MS * max(1, math.ceil(span_ms / _MINUTE_MS / _MOST_BINS))
    horizon = _horizon(store, settings)
    outlook = store.outlook(horizon=horizon, until_ms=store.now_ms() + span_ms)

    def ahead(of: Outlook) -> _Ahead:
        return _Ahead(of, catalogue, settings, horizon=horizon, end_ms=outlook.now_ms + span_ms, bin_ms=bin_ms)

    found = ahead(_resumed(outlook, resume)).forecast(enable, limits or {}, slots)
    if not (enable or limits or came or resume or slots is not None):
        return found
    less = [replace(one, users=-one.users) for one in came]
    return replace(found, before=ahead(outlook).forecast(less, {}, None, points=False))


def _resumed(outlook: Outlook, names: Sequence[str]) -> Outlook:
    """With these definitions not paused."""
    known = {name: replace(outlook.definitions[name], paused="") for name in names if name in outlook.definitions}
    return replace(outlook, definitions={**outlook.definitions, **known}) if known else outlook


def _check(more: Added, catalogue: Mapping[str, Definition]) -> None:
    if more.definition not in catalogue:
        raise InvalidInput(f"definition {more.definition!r} is not known; `taskplatform tasks list` shows all", field="enable")
    if isinstance(more.users, bool) or not isinstance(more.users, int) or not 0 < more.users <= _MOST_USERS:
        raise InvalidInput(f"users {more.users!r} of {more.definition} is not accepted: 1 to {_MOST_USERS:,} is", field="enable")


def _horizon(store: Store, settings: Settings) -> timedelta:
    """The horizon of the planner that leads; where none ever did, that of the settings."""
    told = store.planner().get("horizon")
    return timedelta(milliseconds=int(told)) if told else settings.plan_horizon


class _Ahead:
    """Forecasts from one look at the store."""

    def __init__(
        self,
        outlook: Outlook,
        catalogue: Mapping[str, Definition],
        settings: Settings,
        *,
        horizon: timedelta,
        end_ms: int,
        bin_ms: int,
    ) -> None:
        self._outlook = outlook
        self._catalogue = catalogue
        self._settings = settings
        self._horizon = horizon
        self._end_ms = end_ms
        self._bin_ms = bin_ms
        self._measures = measure(outlook.definitions)
        #: Definitions that are not here as they are published.
        self._changed = sorted(
            name for name, known in outlook.definitions.items() if name in catalogue and known.version not in ("", catalogue[name].version)
        )

    def forecast(self, more: Sequence[Added], limits: Mapping[str, Limit], slots: int | None, *, points: bool = True) -> Forecast:
        """With these subscribers, limits and slots beside what there is."""
        pools = self._pools(slots)
        simulation = self._simulate(more, limits, pools)
        stream = simulation.stream
        short = [any(places.short[bin_] for places in stream.slots) for bin_ in range(stream.bins)]
        # with too few slots something else goes on than with enough
        ample = self._simulate(more, limits, None) if any(short) else simulation
        busy = busy_slots(ample.stream)
        top = max(range(len(busy)), key=busy.__getitem__)
        return Forecast(
            start_ms=stream.start_ms,
            end_ms=stream.end_ms,
            bin_ms=stream.bin_ms,
            enable=tuple(_sums(more).items()),
            set_limits=tuple((name, limit_text(limit)) for name, limit in limits.items()),
            total_per_second=simulation.limits()["total"].sustained if "total" in simulation.limits() else None,
            total=next(iter(tracks(stream, lambda _: "total")), _nothing("total")),
            priorities=tuple(
                next((one for one in tracks(stream, lambda lane: lane.priority, points=points) if one.name == priority), _nothing(priority))
                for priority in Priority
            ),
            definitions=tuple(tracks(stream, lambda lane: lane.definition, points=points)),
            hosts=tuple(tracks(stream, lambda lane: lane.host, points=points)),
            limits=tuple(limit_uses(simulation)),
            backlogs=tuple(backlogs(stream)),
            windows=tuple(widenings(simulation.opened)),
            slots=Slots(
                there=None if pools is None else sum(pool.slots for pool in pools),
                needed=math.ceil(busy[top] - 1e-6),
                needed_at_ms=stream.start_ms + top * stream.bin_ms if busy[top] else None,
                busy=tuple((bin_, round(one, 3)) for bin_, one in enumerate(busy) if one >= 0.001) if points else (),
                short=spans(stream, short),
            ),
            costs=tuple(
                Cost(name, round(one.seconds, 4), round(one.attempts, 4), one.runs, one.source.value)
                for name, one in sorted(self._measures.items())
                if any(lane.definition == name for lane in stream.lanes.values())
            ),
            assumptions=tuple(self._assumptions(simulation, pools, slots)),
            left_out=tuple(self._left_out(simulation, more)),
        )

    def _simulate(self, more: Sequence[Added], limits: Mapping[str, Limit], pools: Sequence[Pool] | None) -> Simulation:
        in_force = {one.name: one for one in self._outlook.limits if not one.name.startswith("user")}
        tokens = {
            name: float(state.tokens) + state.reserved
            for name, state in in_force.items()
            if state.tokens is not None and name not in limits
        }
        chosen = {name: state.limit for name, state in in_force.items()}
        for name in self._changed:
            of = f"definition:{name}"
            if of not in in_force or not in_force[of].live:
                chosen[of] = limit_of(self._catalogue[name])
        chosen |= limits
        simulation = Simulation(
            self._outlook,
            self._catalogue,
            self._measures,
            horizon=self._horizon,
            end_ms=self._end_ms,
            bin_ms=self._bin_ms,
            limits=chosen,
            tokens=tokens,
            pools=pools,
            share=self._settings.lower_share if self._outlook.share is None else self._outlook.share,
            more=more,
        )
        simulation.run()
        return simulation

    def _pools(self, slots: int | None) -> list[Pool] | None:
        """The slots of the workers that live and take jobs; None where there are none."""
        if slots is not None:
            return [Pool(frozenset(Priority), slots)]
        oldest_ms = self._outlook.now_ms - self._settings.heartbeat_timeout / timedelta(milliseconds=1)
        found: Counter[frozenset[Priority]] = Counter()
        for worker in self._outlook.workers:
            queues = frozenset(priority for priority in Priority if priority in worker.queues)
            if worker.heartbeat_ms >= oldest_ms and not worker.drained and worker.slots and queues:
                found[queues] += worker.slots
        return [Pool(queues, count) for queues, count in found.items()] or None

    def _assumptions(self, simulation: Simulation, pools: Sequence[Pool] | None, slots: int | None) -> list[str]:
        found = []
        if pools is None:
            found.append("No worker lives and takes jobs: it was taken that there are as many as are needed.")
        elif slots is not None:
            found.append(f"It was taken that workers have {slots:,} slots, as was asked for.")
        if self._changed:
            found.append(f"Not published as they are here, and forecast as they are here from now on: {_named(self._changed)}.")
        sources: dict[Source, list[str]] = {}
        for name in sorted({lane.definition for lane in simulation.stream.lanes.values()}):
            sources.setdefault(self._measures[name].source, []).append(name)
        taken = {
            Source.PRIORITY: "the median of the definitions of their priority was taken",
            Source.ALL: "the median of all definitions was taken",
            Source.ASSUMED: f"it was taken that a run takes {ASSUMED_SECONDS:g} s, and that nothing is tried again",
        }
        for source, what in taken.items():
            if names := sources.get(source):
                found.append(f"Too few runs were measured of {_named(names)}: {what}.")
        if any(name.startswith("user") for name in (one.name for one in self._outlook.limits)):
            found.append("Limits of users are not simulated: what they hold back goes at once here.")
        if self._settings.fairness if self._outlook.fairness is None else self._outlook.fairness:
            found.append("Turns of users (fairness) are not simulated: inside a priority the longest due goes first here.")
        going = [one for one in self._outlook.backfills if one.definition in simulation.definitions and one.state is BackfillState.RUNNING]
        if going:
            jobs = sum(one.left for one in going)
            found.append(
                f"Backfills go on, with {jobs:,.0f} jobs still to make at the most; those are fewer that exist already: "
                f"{_named([f'{one.id} of {one.definition}' for one in going])}."
            )
        return found

    def _left_out(self, simulation: Simulation, more: Sequence[Added]) -> list[str]:
        outlook, found = self._outlook, []
        paused = sorted(name for name, one in outlook.definitions.items() if one.paused)
        if paused:
            found.append(f"Paused, and left out with what waits of it: {_named(paused)}.")
        if asked := sorted(name for name in _sums(more) if name in paused):
            found.append(f"More subscribers change nothing while it is paused: {_named(asked)}.")
        if skipped := [f"{round(jobs):,} of {name}" for name, jobs in simulation.one_at_a_time.skipped.items() if jobs >= 1]:
            found.append(f"Skipped, because the user's last job would not be finished (overlap: skip): {_named(skipped)}.")
        if waits := [f"{one.id} of {one.definition}" for one in outlook.backfills if one.state is BackfillState.PAUSED]:
            found.append(f"Backfills that are paused: {_named(waits)}.")
        unknown = sorted(outlook.definitions.keys() - self._catalogue.keys())
        if unknown:
            found.append(f"Published, but not among the definitions here: {_named(unknown)}.")
        unpublished = sorted(name for name in _sums(more) if name not in outlook.definitions)
        if unpublished:
            found.append(f"Not published yet, so nothing is planned of it: {_named(unpublished)}.")
        return found


def _sums(more: Sequence[Added]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in more:
        found[one.definition] += one.users
    return found


def _nothing(name: str) -> Track:
    return Track(name, 0, 0, 0, None, 0, 0)


def _named(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
