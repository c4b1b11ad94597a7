"""`taskplatform completion`: scripts for shells; and what they offer for ids.

Ids of definitions come from their files, users and jobs from the platform, when it answers at once. Completion never says what went wrong:
then there is nothing to offer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

if TYPE_CHECKING:
    from taskplatform.cli.arguments import AnyPlatform

SHELLS = ("bash", "zsh", "fish")
#: Users and jobs that are looked at.
_MOST = 200


@click.command(epilog="\b\nExamples:\n  taskplatform completion bash > ~/.local/share/bash-completion/completions/taskplatform")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    \b
    bash: source it, or put it into ~/.local/share/bash-completion/completions/taskplatform
    zsh:  put it as _taskplatform into a folder of $fpath
    fish: put it into ~/.config/fish/completions/taskplatform.fish

    Ids of definitions are completed from the files, users and jobs from the platform.
    """
    from taskplatform.cli.remote import refuse_url

    refuse_url()
    found = get_completion_class(shell)
    assert found is not None
    root = ctx.find_root()
    # the version check of click's bash class runs bash, which this machine may not have
    click.echo(found.source_template % found(root.command, {}, "taskplatform", "_TASKPLATFORM_COMPLETE").source_vars())


def definitions(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Ids of definitions, from the files."""
    with contextlib.suppress(Exception):
        from pathlib import Path

        from taskplatform.catalogue import load
        from taskplatform.cli.remote import connect, wanted
        from taskplatform.settings import settings

        with _settled(ctx):
            if wanted():
                return _items(incomplete, ((one.id, one.name) for one in connect().definitions()))
            return _items(incomplete, ((id_, one.name) for id_, one in load(Path(settings().tasks_dir)).items()))
    return []


def users(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Ids of users, of the first ones."""
    return _ask(ctx, incomplete, lambda platform: ((one.id, one.name) for one in platform.users(limit=_MOST).items))


def jobs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Ids of the newest jobs."""
    return _ask(ctx, incomplete, lambda platform: ((one.id, str(one.state)) for one in platform.jobs(limit=_MOST).items))


def workers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Ids of workers."""
    return _ask(ctx, incomplete, lambda platform: ((one.id, "") for one in platform.workers()))


def backfills(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Ids of the newest backfills."""
    return _ask(ctx, incomplete, lambda platform: ((one.id, f"{one.definition}, {one.state}") for one in platform.backfills(limit=_MOST)))


def _ask(ctx: click.Context, incomplete: str, find: Callable[[AnyPlatform], Iterable[tuple[str, str]]]) -> list[CompletionItem]:
    with contextlib.suppress(Exception):
        from taskplatform.cli.arguments import connected

        with _settled(ctx), connected(definitions=False) as platform:
            return _items(incomplete, find(platform))
    return []


@contextmanager
def _settled(ctx: click.Context) -> Iterator[None]:
    """With what the line gave before: while a line is completed, no command's function runs."""
    from taskplatform.cli.remote import keep_options

    given = ctx.find_root().params
    keep_options(ctx, **{name: given.get(name) for name in ("url", "key_file", "ca", "client_cert", "client_key")})
    with ctx.scope(cleanup=False):
        yield


def _items(incomplete: str, found: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    return [CompletionItem(id_, help=text or None) for id_, text in found if id_.startswith(incomplete)]
