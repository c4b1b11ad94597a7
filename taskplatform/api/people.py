"""Users and their subscriptions."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import Path
from fastapi.responses import Response

from taskplatform.api.call import Administers, Call, Reads, Submits
from taskplatform.api.records import (
    Deletion,
    NewSubscription,
    NewUser,
    SubscriberPage,
    SubscriptionChange,
    SubscriptionRecord,
    Subscriptions,
    Unsubscription,
    UserPage,
    UserRecord,
)
from taskplatform.api.routing import Cursor, PageSize, Routes, cursor_of, token_of
from taskplatform.model import Subscription

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
        record = UserRecord.model_validate(call.platform.create_user(body.id, name=body.name))
        return call.answer(record, 201, headers={"Location": f"/v1/users/{quote(body.id, safe='@+')}"})

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
        call.platform.pause_user(user)
        return _user(call, user)

    return call.once(act)


@users("POST", "/users/{user}/resume", UserRecord, faults=(404,))
def resume_user(call: Submits, user: User) -> Response:
    """End a user's pause."""

    def act() -> Response:
        call.platform.resume_user(user)
        return _user(call, user)

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
        call.platform.pause_subscription(user, definition)
        return _subscription(call, call.platform.subscription(user, definition))

    return call.once(act)


@subscriptions("POST", f"{_SUBSCRIPTION}/resume", SubscriptionRecord, faults=(404,))
def resume_subscription(call: Submits, user: User, definition: DefinitionName) -> Response:
    """End the pause of a subscription."""

    def act() -> Response:
        call.platform.resume_subscription(user, definition)
        return _subscription(call, call.platform.subscription(user, definition))

    return call.once(act)


def _subscription(call: Call, found: Subscription) -> Response:
    return call.answer(SubscriptionRecord.model_validate(found))
