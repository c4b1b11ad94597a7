"""What README and docs say to type: each command is typed, against one running platform, and ends well."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from taskplatform.catalogue import load
from taskplatform.local import find_port
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from tests.acceptance.fastcli import PROGRAM
from tests.acceptance.nodes import Guard
from tests.acceptance.site import base_environment
from tests.acceptance.upnode import REAL_COMMAND, UpNode
from tests.conftest import ROOT
from tests.documents import NOT_RUN, PAGES, RUN, SERVE, Block, blocks, calls, matches
from tests.support import wait_until

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_PAGES = sorted({block.page for block in BLOCKS if block.mark in (RUN, SERVE)})
#: These pages tell where Redis is; readers of the others know it.
BEGINNINGS = ("README.md", "docs/getting-started.md")
#: For one command, on a busy machine.
SECONDS = 120
MARKER = "@@ended"


class Folder:
    """A copy of what of the repository commands need, where they may write."""

    def __init__(self, path: Path, programs: Path) -> None:
        self.path = path
        path.mkdir()
        for name in ("tasks", "deploy"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("celeryconfig.py", "beat_schedule.py", "constraints.txt", "Makefile"):
            shutil.copy(ROOT / name, path / name)
        for name in ("taskplatform", "tests", "bench", "docs", "scripts"):
            if (ROOT / name).exists():
                (path / name).symlink_to(ROOT / name)
        binaries = path / ".venv/bin"
        binaries.mkdir(parents=True)
        for program in Path(sys.executable).parent.iterdir():
            if program.name != "taskplatform" and not program.name.startswith("activate"):
                (binaries / program.name).symlink_to(program)
        for name in ("pyvenv.cfg", "lib"):
            (path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
        (binaries / "taskplatform").symlink_to(programs / "taskplatform")
        (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n', encoding="utf-8")


class Town:
    """The platform that runs, and the server of short commands beside it."""

    def __init__(self, up: UpNode, programs: Path, guard: Guard) -> None:
        self.up = up
        self.programs = programs
        self.redis_url = up.address("Redis")
        definitions = load(ROOT / "tasks", environment={"API_BASE_URL": up.address("Mock API"), "API_TOKEN": "token"})
        self.platform = Platform.connect(load_settings(redis_url=self.redis_url), catalogue=definitions)
        found = {"6380": self.redis_url, "5555": up.address("Flower"), "8000": up.address("Mock API")}
        self.ports = {well_known: urlsplit(url).port or 0 for well_known, url in found.items()}
        given = base_environment("", guard.environment)
        self.environment = {name: value for name, value in given.items() if not name.startswith("TASKPLATFORM_")}

    def here(self, text: str) -> str:
        """With the ports of this run in place of the well-known ones."""
        for well_known in ("8443", "5556"):
            if well_known in text and well_known not in self.ports:
                self.ports[well_known] = find_port(avoid=set(self.ports.values()))
        return re.sub(r"\b(6380|5555|5556|8000|8443)\b", lambda found: str(self.ports.get(found[1], found[1])), text)

    def tidy(self) -> None:
        """What a page may count on: nothing of what another one did."""
        store = self.platform.store
        self.platform.create_users(("u1", "u2"))
        for name in ("u1", "u2"):
            self.platform.resume_user(name)
        for state in self.platform.limits():
            self.platform.reset_limit(state.name)
        for definition in ("daily_user_report", "hourly_data_sync"):
            self.platform.resume_definition(definition)
        for key in store.access.list_keys():
            store.access.revoke_key(key.id, actor="test", log_size=100)
        self.ports.pop("8443", None)
        self.ports.pop("5556", None)


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """What the pages call beside the platform's own commands."""
    missing = [name for name in ("bash", "curl", "jq") if shutil.which(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{', '.join(missing)} is missing")
    if missing:
        pytest.skip(f"{', '.join(missing)} is missing")


@pytest.fixture(scope="module")
def town(up: UpNode, guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    programs = tmp_path_factory.mktemp("programs")
    path = programs / "cli.socket"
    environment = base_environment("", guard.environment)
    argv = [sys.executable, "-m", "tests.acceptance.fastcli", str(path)]
    cli = subprocess.Popen(argv, cwd=ROOT, env=environment, start_new_session=True)
    try:
        wait_until(path.exists, seconds=SECONDS)
        command = programs / "taskplatform"
        command.write_text(PROGRAM.format(python=sys.executable, real=REAL_COMMAND, socket=str(path)), "utf-8")
        command.chmod(0o755)
        made = Town(up, programs, guard)
        yield made
        made.platform.close()
    finally:
        cli.kill()
        cli.wait()


class Terminal:
    """A bash in which somebody types. It ends at the first command that fails."""

    def __init__(self, town: Town, folder: Path, page: str) -> None:
        self._town = town
        self._folder = folder
        environment = {**town.environment, "PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        if page not in BEGINNINGS:
            environment["TASKPLATFORM_REDIS_URL"] = town.redis_url
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-euo", "pipefail"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._serving: list[int] = []
        self.output = ""

    def serve(self, text: str) -> bool:
        """Run it, which does not end."""
        log = self._folder / f"serving{len(self._serving)}.log"
        before = self._look(text)
        command = re.sub(r"\s#\s.*", "", text)
        assert self.run(f"{{ exec {command}\n}} >{log} 2>&1 &\necho $!")
        pid = int(self.output.split()[0])
        self._serving.append(pid)
        try:
            wait_until(lambda: self._look(text) > before or not _lives(pid), seconds=2 * SECONDS)
        except AssertionError:
            raise AssertionError(f"{text} does not serve:\n{log.read_text('utf-8')}") from None
        self.output = log.read_text("utf-8")
        return _lives(pid)

    def close(self) -> None:
        """End what it started."""
        for pid in self._serving:
            if _lives(pid):
                os.kill(pid, signal.SIGTERM)
        for pid in self._serving:
            wait_until(lambda pid=pid: not _lives(pid), seconds=SECONDS)  # type: ignore[misc]
        assert self._bash.stdin is not None
        self._bash.stdin.close()
        self._bash.wait(SECONDS)
        assert self._bash.stdout is not None
        self._bash.stdout.close()

    def run(self, text: str) -> bool:
        """Whether it ended well. `output` is what it showed."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        if "taskplatform health" in text:
            # of a machine that was busy with other things it may say for a moment that something came late
            wait_until(lambda: self._town.platform.health().well, seconds=2 * SECONDS)
        script = self._folder / ".typed"
        script.write_text(self._town.here(text) + "\n", encoding="utf-8")
        self._bash.stdin.write(f". {script} </dev/null\nprintf '\\n{MARKER}\\n'\n")  # what it prints may not end its line
        self._bash.stdin.flush()
        seen: list[str] = []
        too_long = threading.Timer(SECONDS, os.killpg, (self._bash.pid, signal.SIGKILL))
        too_long.start()
        try:
            for line in self._bash.stdout:
                if line.strip() == MARKER:
                    return True
                seen.append(line)
            return False
        finally:
            too_long.cancel()
            self.output = "".join(seen)

    def _look(self, text: str) -> int:
        """How many there are of what the command starts."""
        if found := re.search(r"celery .*\b(worker|beat|flower)\b", text):
            role = found[1]
            if role == "flower":
                return int(_answers(f"http://127.0.0.1:{self._town.here('5556')}/healthcheck"))
            store = self._town.platform.store
            return len(store.workers()) if role == "worker" else len(store.beats())
        if "taskplatform api" in text:
            return int(_connects(int(self._town.here("8443"))))
        raise AssertionError(f"how is it seen that this serves: {text}")


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=30).status_code == 200
    except requests.RequestException:
        return False


def _connects(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _serves(command: str) -> bool:
    return bool(re.search(r"celery .*\b(worker|beat|flower)\b|taskplatform (api|up)\b(?!.*--openapi)", command))


@pytest.mark.parametrize("page", RUN_PAGES)
@pytest.mark.timeout(900)
def test_the_commands_of_a_page_do_what_they_are_said_to(page: str, town: Town, tmp_path: Path) -> None:
    town.tidy()
    folder = Folder(tmp_path / "copy", town.programs)
    terminal = Terminal(town, folder.path, page)
    try:
        for block in (block for block in BLOCKS if block.page == page and block.mark in (RUN, SERVE)):
            for command in block.commands:
                where = f"{page}:{command.line}: {command.text}"
                if block.mark == SERVE and re.search(r"taskplatform up\b|^make up\b", command.text):
                    assert town.up.status == "running"  # it is what all the others talk to
                elif block.mark == SERVE and _serves(command.text):
                    assert terminal.serve(command.text), f"{where}\n{terminal.output}"
                else:
                    assert terminal.run(command.text), f"{where}\n{terminal.output}"
                    missing = matches(command.prints, terminal.output)
                    assert missing is None, f"{where}\ndid not print {missing!r}, but\n{terminal.output}"
    finally:
        terminal.close()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark in NOT_RUN], ids=lambda block: block.where)
def test_what_cannot_be_run_here_could_be(block: Block) -> None:
    text = "\n".join(command.text for command in block.commands)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.where}: {done.stderr}"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for program, words in calls(block):
        if program == "make":
            targets = [word for word in words if "=" not in word and not word.startswith("-")]
            assert all(re.search(rf"(?m)^{re.escape(target)}:", makefile) for target in targets), f"{block.where}: make {words}"
        elif Path(program).name.startswith("python") and words[:2] == ["-m", "bench"]:
            names = [word for word in words[2:3] if not word.startswith("-")]
            assert all((ROOT / "bench" / f"{name}.py").exists() for name in names), f"{block.where}: {words}"
        elif program.startswith("./"):
            assert os.access(ROOT / program, os.X_OK), f"{block.where}: {program} is no program"


def test_no_block_is_left_out() -> None:
    unknown = [f"{block.where}: {block.mark!r}" for block in BLOCKS if not block.known]
    assert unknown == [], f"a mark is one of serve, {', '.join(NOT_RUN)}"
    fences = sum(len(re.findall(r"(?m)^ *```(?:sh|bash|shell|console)\b", page.read_text("utf-8"))) for page in PAGES)
    assert fences == len(BLOCKS)
    kinds = Counter({RUN: "run", SERVE: "run until ended"}.get(block.mark, f"checked only: {block.mark}") for block in BLOCKS)
    by_hand = [block for block in BLOCKS if block.mark != "example"]
    commands = Counter(block.mark in (RUN, SERVE) for block in by_hand for _ in block.commands)
    print({**kinds, "commands run": commands[True], "commands checked only": commands[False]})
    assert commands[True] > commands[False], kinds
