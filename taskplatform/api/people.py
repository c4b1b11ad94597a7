"""Users and their subscriptions."""

from __future__ import annotations

from collections import Counter
from typing import Annotated
from urllib.parse import quote

from fastapi import Path
from fastapi.responses import Response

from taskplatform.api.call import Administers, Call, Reads, Submits
from taskplatform.api.jobs import problem_of_item
from taskplatform.api.records import (
    Deletion,
    NewSubscription,
    NewUser,
    SubscriberCount,
    SubscriberPage,
    SubscriptionBatch,
    SubscriptionChange,
    SubscriptionRecord,
    SubscriptionResult,
    SubscriptionResults,
    Subscriptions,
    Unsubscription,
    UserPage,
    UserRecord,
)
from taskplatform.api.routing import Cursor, PageSize, Routes, cursor_of, token_of
from taskplatform.errors import InvalidInput, TaskPlatformError, UnknownUser
from taskplatform.model import Subscription
from taskplatform.platform import SubscriptionRequest
from taskplatform.store import SubscribeResult

users = Routes("users")
subscriptions = Routes("subscriptions")

User = Annotated[str, Path(max_length=200, description="the user's id", examples=["u1"])]
DefinitionName = Annotated[str, Path(max_length=100, description="the definition's id", examples=["daily_user_report"])]
_SUBSCRIPTION = "/users/{user}/subscriptions/{definition}"


@users("GET", "/users", UserPage)
def list_users(call: Reads, limit: PageSize = 100, cursor: Cursor = None) -> Response:
    """List users in order of their ids, in stable pages."""
    page = call.platform.users(cursor=cursor_of(cursor), limit=limit)
    return call.answer(UserPage(items=[UserRecord.model_validate(one) for one in page.items], next=token_of(page.cursor)))


@users("POST", "/users", UserRecord, takes=NewUser, status=201)
def create_user(call: Submits) -> Response:
    """Create a user. One that exists stays as it is."""
    body = call.read(NewUser)
    call.note(user=body.id)

    def act() -> Response:
        new = call.platform.add_user(body.id, name=body.name)
        record = UserRecord.model_validate(call.platform.user(body.id))
        return call.changed(call.answer(record, 201, headers={"Location": f"/v1/users/{quote(body.id, safe='@+')}"}), new)

    return call.once(act)


@users("GET", "/users/{user}", UserRecord, faults=(404,))
def get_user(call: Reads, user: User) -> Response:
    """Get a user."""
    return _user(call, user)


@users("DELETE", "/users/{user}", Deletion, faults=(404,))
def delete_user(call: Administers, user: User) -> Response:
    """Delete a user with subscriptions, jobs and histories; what waits or runs is canceled."""
    canceled, removed = call.platform.delete_user(user)
    return call.answer(Deletion(jobs_canceled=canceled, subscriptions_removed=removed))


@users("POST", "/users/{user}/pause", UserRecord, faults=(404,))
def pause_user(call: Submits, user: User) -> Response:
    """Plan and release nothing for a user until they are resumed. What waits is kept."""

    def act() -> Response:
        changed = call.platform.pause_user(user)
        return call.changed(_user(call, user), changed)

    return call.once(act)


@users("POST", "/users/{user}/resume", UserRecord, faults=(404,))
def resume_user(call: Submits, user: User) -> Response:
    """End a user's pause."""

    def act() -> Response:
        changed = call.platform.resume_user(user)
        return call.changed(_user(call, user), changed)

    return call.once(act)


def _user(call: Call, user: str) -> Response:
    return call.answer(UserRecord.model_validate(call.platform.user(user)))


# --- subscriptions ---------------------------------------------------------------------------------------------------


@subscriptions("GET", "/users/{user}/subscriptions", Subscriptions, faults=(404,))
def list_subscriptions(call: Reads, user: User) -> Response:
    """List all subscriptions of a user."""
    found = call.platform.subscriptions(user)
    return call.answer(Subscriptions(items=[SubscriptionRecord.model_validate(one) for one in found]))


@subscriptions("GET", "/definitions/{definition}/subscribers", SubscriberPage, faults=(404,))
def list_subscribers(call: Reads, definition: DefinitionName, limit: PageSize = 100, cursor: Cursor = None) -> Response:
    """List the users that are subscribed to a definition, in stable pages."""
    page = call.platform.subscribers(definition, cursor=cursor_of(cursor), limit=limit)
    return call.answer(SubscriberPage(items=list(page.items), next=token_of(page.cursor)))


@subscriptions("GET", "/definitions/{definition}/subscribers/count", SubscriberCount, faults=(404,))
def count_subscribers(call: Reads, definition: DefinitionName) -> Response:
    """Count the users that are subscribed to a definition."""
    return call.answer(SubscriberCount(subscribers=call.platform.count_subscribers(definition)))


@subscriptions("POST", "/subscriptions/batch", SubscriptionResults, takes=SubscriptionBatch)
def make_subscriptions(call: Submits) -> Response:
    """Make many subscriptions, or set them to just this, each on its own: what is wrong with one holds back no other.

    When many came, it is forecast what they bring, and `warnings` says what gets worse by them.
    """
    body = call.read(SubscriptionBatch)

    def act() -> Response:
        asked = [SubscriptionRequest(**dict(item)) for item in body.items]
        results, created = call.platform.subscribe_each(asked, create_users=body.create_users)
        items = [_result(place, result) for place, result in enumerate(results)]
        call.note(made=f"{sum(item.problem is None for item in items)}/{len(items)}", users_created=created)
        new = Counter(one.definition for one, result in zip(asked, results, strict=True) if result is SubscribeResult.CREATED)
        warnings = call.growth.warnings(call.platform, new)
        return call.answer(SubscriptionResults(items=items, users_created=created, warnings=warnings))

    return call.once(act)


def _result(place: int, result: SubscribeResult | TaskPlatformError) -> SubscriptionResult:
    if isinstance(result, TaskPlatformError):
        field = result.field if isinstance(result, InvalidInput) else "user" if isinstance(result, UnknownUser) else "definition"
        return SubscriptionResult(status=422, problem=problem_of_item(place, field, result))
    return SubscriptionResult.model_validate({"status": 201 if result is SubscribeResult.CREATED else 200, "result": result.name.lower()})


@subscriptions("GET", _SUBSCRIPTION, SubscriptionRecord, faults=(404,))
def get_subscription(call: Reads, user: User, definition: DefinitionName) -> Response:
    """Get a subscription."""
    return _subscription(call, call.platform.subscription(user, definition))


@subscriptions("PUT", _SUBSCRIPTION, SubscriptionRecord, takes=NewSubscription, faults=(404,))
def put_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """Subscribe a user, or set an existing subscription to just this.

    A new schedule takes effect after the planning horizon: earlier moments still belong to the old one.
    """
    body = call.read(NewSubscription)
    found = call.platform.subscribe(user, definition, params=body.params, schedule=body.schedule, enabled=body.enabled)
    return _subscription(call, found)


@subscriptions("PATCH", _SUBSCRIPTION, SubscriptionRecord, takes=SubscriptionChange, faults=(404,))
def change_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """Change some of a subscription, in one step. What is not given stays; a `schedule` of null is the definition's again."""
    body = call.read(SubscriptionChange)
    given = body.model_fields_set
    found = call.platform.change_subscription(
        user,
        definition,
        params=body.params if "params" in given else None,
        schedule=body.schedule,
        default_schedule="schedule" in given and body.schedule is None,
        enabled=body.enabled if "enabled" in given else None,
    )
    return _subscription(call, found)


@subscriptions("DELETE", _SUBSCRIPTION, Unsubscription, faults=(404,))
def delete_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """End a subscription; what waits of it is canceled."""
    return call.answer(Unsubscription(jobs_canceled=call.platform.unsubscribe(user, definition)))


@subscriptions("POST", f"{_SUBSCRIPTION}/pause", SubscriptionRecord, faults=(404,))
def pause_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """Plan and release nothing of a subscription until it is resumed. What waits is kept."""

    def act() -> Response:
        changed = call.platform.pause_subscription(user, definition)
        return call.changed(_subscription(call, call.platform.subscription(user, definition)), changed)

    return call.once(act)


@subscriptions("POST", f"{_SUBSCRIPTION}/resume", SubscriptionRecord, faults=(404,))
def resume_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """End the pause of a subscription."""

    def act() -> Response:
        changed = call.platform.resume_subscription(user, definition)
        return call.changed(_subscription(call, call.platform.subscription(user, definition)), changed)

    return call.once(act)


def _subscription(call: Call, found: Subscription) -> Response:
    return call.answer(SubscriptionRecord.model_validate(found))
