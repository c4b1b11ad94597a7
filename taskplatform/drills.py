"""The definitions that `taskplatform verify` runs: the platform's own, beside those in `tasks/`.

Every process has them while the setting `verify_definitions` is on, because a verification of what is deployed can only use what beat
and workers know. They are harmless, whoever may submit jobs: their functions sleep for bounded times, fail or return, and read no
parameter but numbers; each has a concurrency or a rate of its own. None comes due by itself. The one that makes an HTTP call exists
only where the setting `verify_target` names the target, which `http_allow` must let through like any other.
"""

from __future__ import annotations

from typing import Any

from taskplatform.model import Definition

#: Their domain, in lists.
DOMAIN = "verification"
#: A job that does what its parameters say: sleeps for `seconds`, and fails in its first `failures` attempts.
RUN = "verify_run"
#: One at a time, so that the others wait, and it shows which one goes next.
ORDER = "verify_order"
#: Spread over a window.
SPREAD = "verify_spread"
#: Under a rate limit.
LIMITED = "verify_limited"
#: The same as a call to the target.
CALL = "verify_call"
#: Fails for good after one retry.
FAIL = "verify_fail"
#: Runs into its time limit.
SLOW = "verify_slow"
#: Its first attempt goes on until its worker is killed; the next one returns.
HOLD = "verify_hold"

#: The path at the target.
CALL_PATH = "/taskplatform-verify"

_FUNCTIONS = "taskplatform.verification.functions"
#: The only one that comes due by itself in a lifetime of a verification's user would do so on 29 February.
_NEVER = {"expression": "0 0 29 2 *"}
_RATE = {"rate": "10/s", "burst": 5}
_QUICK = {"strategy": "fixed", "base": "300ms", "jitter": "none"}


def drills(target: str | None = None) -> tuple[Definition, ...]:
    """The definitions; with that of the call, where there is a `target` such as "http://10.0.0.5:8099"."""
    quick = f"{_FUNCTIONS}:quick"
    given: list[dict[str, Any]] = [
        {
            "id": RUN,
            "name": "Verification: a run",
            "retries": 2,
            "backoff": {"strategy": "exponential", "base": "1s", "cap": "8s", "jitter": "none"},
            "concurrency": 4,
        },
        {"id": ORDER, "name": "Verification: one at a time", "concurrency": 1, "params": {"seconds": 0.25}},
        {"id": SPREAD, "name": "Verification: spread over a window", "window": "10s", "concurrency": 8, "call": quick},
        {"id": LIMITED, "name": "Verification: under a rate limit", "rate_limit": _RATE, "call": quick},
        {
            "id": FAIL,
            "name": "Verification: fails for good",
            "retries": 1,
            "backoff": _QUICK,
            "params": {"failures": 100},
            "concurrency": 2,
        },
        {"id": SLOW, "name": "Verification: runs into its time limit", "max_duration": "1s", "params": {"seconds": 10}, "concurrency": 2},
        {"id": HOLD, "name": "Verification: held until its worker dies", "call": f"{_FUNCTIONS}:hold", "timeout": "2m", "concurrency": 2},
    ]
    if target is not None:
        config = {"endpoint": target.rstrip("/") + CALL_PATH, "method": "POST", "body": {"job": "{{job_id}}"}, "max_duration": "5s"}
        given.append({"id": CALL, "name": "Verification: a call under a rate limit", "rate_limit": _RATE, "config": config})
    common = {"cron": _NEVER, "timeout": "30s", "retries": 0, "description": "Of `taskplatform verify`; runs only while that does."}
    run = {"call": f"{_FUNCTIONS}:work"}
    return tuple(Definition.model_validate({**common, **({} if "config" in one else run), **one}) for one in given)


def is_drill(definition: str) -> bool:
    """Whether this is the id of one of them."""
    return definition in _IDS


_IDS = frozenset(one.id for one in drills("http://localhost"))
