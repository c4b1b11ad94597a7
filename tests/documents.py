"""README and docs as tests see them: their blocks of commands, and what each block's mark says of it.

A block of shell begins with ```console or ```sh. In `console` a line after `$ ` is a command (`> ` goes on with it), and other lines
are what it prints, where `…` stands for anything and white space counts as one blank. A `sh` block is one script. What stands
behind the language is the mark:

- none: the block is run, in the order of the page, against a running platform (tests/acceptance/test_docs_commands.py);
- `serve`: so too, but its last commands go on until somebody ends them; the test waits until each does its work;
- one of `NOT_RUN`: it needs what a test does not have; its syntax, and the commands, targets and files that it names, are checked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

RUN, SERVE = "", "serve"
#: Marks of blocks that are only checked, and why.
NOT_RUN = {
    "docker": "needs a Docker engine",
    "kubectl": "needs a Kubernetes cluster",
    "root": "needs root, systemd or a package manager",
    "internet": "needs the network, and installs something",
    "long": "takes minutes; each of these is a test run, a benchmark or the demo, and runs by itself",
    "elsewhere": "needs a machine, a host name or a file that only its reader has",
    "example": "stands in a command's help, with ids that are nobody's; test_cli.py has each command take its own",
}
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@dataclass(frozen=True)
class Command:
    """What somebody types, and what he then sees."""

    line: int
    text: str
    prints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One block of shell in a page."""

    page: str
    line: int
    """Of its fence, from 1."""
    mark: str
    commands: tuple[Command, ...]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def known(self) -> bool:
        """Whether its mark is one."""
        return self.mark in (RUN, SERVE) or self.mark in NOT_RUN


def blocks(path: Path) -> list[Block]:
    """All blocks of shell of a page, in its order."""
    name = path.relative_to(ROOT).as_posix()
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    fence = 0
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if not fence:
            fence = number
            continue
        opening = lines[fence - 1].lstrip()
        indent = len(lines[fence - 1]) - len(opening)  # of a block in a list
        language, _, mark = opening.removeprefix("```").partition(" ")
        body = [(at, text[indent:]) for at, text in enumerate(lines[fence : number - 1], fence + 1)]
        if language == "console":
            found.append(Block(name, fence, mark.strip(), tuple(_typed(body))))
        elif language in ("sh", "bash", "shell"):
            found.append(Block(name, fence, mark.strip(), (Command(fence + 1, "\n".join(line for _, line in body)),)))
        fence = 0
    assert not fence, f"{name}:{fence}: this block has no end"
    return found


def _typed(body: list[tuple[int, str]]) -> Iterator[Command]:
    at, text, prints = 0, "", list[str]()
    for number, line in body:
        if line.startswith("$ "):
            if text:
                yield Command(at, text, tuple(prints))
            at, text, prints = number, line[2:], []
        elif line.startswith("> ") and not prints:
            text += "\n" + line[2:]
        elif line.strip():
            prints.append(line)
    if text:
        yield Command(at, text, tuple(prints))


def calls(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The programs that a block calls, by the last part of their names, each with its words; as far as can be seen from its text."""
    for command in block.commands:
        text = re.sub(r"\\\n\s*", " ", command.text)
        text = re.sub(r"(?m)(^|\s)#.*$", "", text)
        for piece in re.split(r"\n|;|&&|\|\|?|\$\(|\{ ", text):
            try:
                words = shlex.split(re.split(r"\s[0-9]?[<>]", piece)[0].rstrip(" )}&"))
            except ValueError:
                continue  # a part of a quoted text
            while words and (re.match(r"[A-Za-z_]\w*=", words[0]) or words[0] in ("if", "then", "do", "while", "!", "time")):
                words = words[1:]
            if words:
                yield words[0], words[1:]


def matches(pattern: tuple[str, ...], output: str) -> str | None:
    """None when the output has these lines, in this order; else the line that it lacks."""
    rest = [" ".join(line.split()) for line in output.splitlines()]
    for line in pattern:
        wanted = re.compile(".*".join(re.escape(" ".join(part.split())) for part in line.split("…")))
        while rest:
            if wanted.fullmatch(rest.pop(0)):
                break
        else:
            return line
    return None
