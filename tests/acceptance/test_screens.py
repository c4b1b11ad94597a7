"""What people see on a platform with jobs of the shipped definitions: dashboard and Flower in a real browser, tables in a terminal.

The pictures in docs/images are made here, by the same code (`make screenshots`): where SCREENSHOTS names a folder, they go there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from taskplatform.catalogue import load
from taskplatform.model import Job, JobState
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from tests.acceptance.site import eventually
from tests.acceptance.upnode import LOGIN, REAL_COMMAND, UpNode
from tests.conftest import ROOT

#: Of a busy machine: a browser is a large program.
SECONDS = 60
#: What a picture in the repository may have, in bytes.
MOST_BYTES = 300_000
#: Columns of the terminal.
WIDTH = 150
JOBS = {
    "hourly_data_sync": ("user1", "user2", "user3"),
    "daily_user_report": ("user2",),
    "weekly_analytics": ("user3",),
    "monthly_billing": ("user4",),
}
#: Of the jobs that do not complete.
ENDS = {"finance_tax_rounding_check": (JobState.RETRYING, JobState.FAILED), "slot_drill": (JobState.FAILED,)}
#: Of a phone, in CSS pixels.
PHONE = (390, 844)
#: How Flower shows each state, and then how many retries there were before.
SHOWN = {"SUCCESS": "0", "RETRY": "0", "FAILURE": "01"}


@pytest.fixture(scope="module")
def platform(up: UpNode) -> Iterator[Platform]:
    definitions = load(ROOT / "tasks", environment={"API_BASE_URL": up.address("Mock API"), "API_TOKEN": "token"})
    made = Platform.connect(load_settings(redis_url=up.address("Redis")), catalogue=definitions)
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Debian's chromium, without a screen."""
    found = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(found):
        if os.environ.get("CI"):
            pytest.fail("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
        pytest.skip("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    options.accept_insecure_certs = True  # `up` has a CA of its own
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for word in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1760,840"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # chromium refuses to have one as root
    driver = webdriver.Chrome(options=options, service=Service(str(found[1])))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def flower(up: UpNode, browser: webdriver.Chrome) -> str:
    """Its address, when the browser has logged in."""
    url = up.address("Flower")
    browser.get(url)
    assert not browser.find_elements(By.ID, "workers-table")  # nothing without the login
    user, password = (quote(part, safe="") for part in LOGIN)
    browser.get(url.replace("://", f"://{user}:{password}@"))
    return url


@pytest.fixture(scope="module")
def jobs(up: UpNode, platform: Platform) -> list[Job]:
    """Jobs that completed; at last one that waits for its second attempt, or failed in it by now; and one that failed."""
    # it shows what happens while it listens
    eventually(lambda: _heard(up) >= 2, "Flower hears nothing", seconds=SECONDS)
    platform.create_users(f"user{number}" for number in range(1, 5))
    made = [platform.enqueue(definition, user=user) for definition, users in JOBS.items() for user in users]
    made.append(platform.enqueue("finance_tax_rounding_check", user="user2", params={"currency": "none"}))
    made.append(platform.enqueue("slot_drill", user="user1", params={"seconds": "not a number"}))
    eventually(
        lambda: all(platform.job(job.id).state in ENDS.get(job.definition, (JobState.COMPLETED,)) for job in made),
        "the jobs do not get there",
        seconds=SECONDS,
    )
    return made


def _heard(up: UpNode) -> int:
    """From how many workers Flower has heard."""
    answer = requests.get(f"{up.address('Flower')}/workers", params={"json": 1}, auth=LOGIN, timeout=SECONDS)
    return sum(bool(worker["status"]) for worker in answer.json()["data"])


def _table(browser: webdriver.Chrome) -> list[dict[str, str]]:
    """The table of tasks, by the names of its columns; a task's id is taken from where it leads."""
    script = """
        const names = [...document.querySelectorAll('#tasks-table thead th')].map(one => one.dataset.column);
        const id = cell => decodeURIComponent(cell.querySelector('a').pathname.split('/').pop());
        return [...document.querySelectorAll('#tasks-table tbody tr')].filter(row => row.cells.length > 1).map(row =>
            Object.fromEntries([...row.cells].map(
                (cell, number) => [names[number], names[number] == 'uuid' ? id(cell) : cell.textContent.trim()])));
    """
    return list(browser.execute_script(script))


def _text(browser: webdriver.Chrome, selector: str) -> str:
    """Of the first such element, shown or not; in one step, because pages renew themselves."""
    return str(browser.execute_script("return (document.querySelector(arguments[0]) || {}).textContent || ''", selector))


def _at(name: str, tmp_path: Path) -> Path:
    """Where a picture goes."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path) / name


def _picture(browser: webdriver.Chrome, name: str, tmp_path: Path) -> None:
    path = _at(name, tmp_path)
    assert browser.save_screenshot(str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 10_000 < len(data) < MOST_BYTES, f"{name} has {len(data)} bytes"


@pytest.mark.timeout(300)
def test_tasks_are_definitions_with_their_users(browser: webdriver.Chrome, flower: str, jobs: list[Job], tmp_path: Path) -> None:
    wanted = {job.id: job for job in jobs}

    def shown() -> dict[str, dict[str, str]]:
        return {row["uuid"]: row for row in _table(browser) if row["uuid"] in wanted}

    def as_they_ended() -> bool:
        browser.get(f"{flower}/tasks")
        eventually(lambda: bool(_table(browser)), "the table stays empty", seconds=SECONDS)
        if len(shown()) < len(wanted):  # those of other tests may fill the first page
            browser.execute_script("$('#tasks-table').DataTable().page.len(100).draw()")
            eventually(lambda: len(shown()) == len(wanted), "a task is not in the table", seconds=SECONDS)
        rows = shown()
        return rows.keys() == wanted.keys() and all(row["state"] in SHOWN for row in rows.values())

    eventually(as_they_ended, "not all jobs are shown as they ended", seconds=SECONDS)
    for name, row in shown().items():
        assert row["name"] == wanted[name].definition
        assert row["kwargs"] == str({"user": wanted[name].user})
        failed = wanted[name].definition in ENDS
        assert row["state"] in (("RETRY", "FAILURE") if failed else ("SUCCESS",))
        assert row["retries"] in SHOWN[row["state"]]
        assert row["worker"].startswith("worker")
    _picture(browser, "flower.png", tmp_path)


def test_a_task_has_a_page(browser: webdriver.Chrome, flower: str, jobs: list[Job]) -> None:
    failed = jobs[-1]

    def ended() -> bool:
        browser.get(f"{flower}/task/{failed.id}")
        return "FAILURE" in _text(browser, "#task-page")

    eventually(ended, "Flower does not know how the job ended", seconds=SECONDS)
    for wanted in (failed.id, "slot_drill", "'user': 'user1'", "not a number"):
        assert wanted in _text(browser, "#task-page")
    assert not browser.find_elements(By.ID, "task-revoke")


def test_workers_have_pages_without_orders(browser: webdriver.Chrome, flower: str, platform: Platform) -> None:
    nodes = [worker.id.partition("#")[0] for worker in platform.workers()]
    assert len(nodes) >= 2
    browser.get(f"{flower}/workers")
    eventually(lambda: all(node in _text(browser, "#workers-table tbody") for node in nodes), "not all workers are listed", seconds=SECONDS)
    limited = next(one for one in platform.catalogue.values() if one.rate_limit)

    def whole() -> bool:
        browser.get(f"{flower}/worker/{nodes[0]}")
        return limited.id in _text(browser, "#tab-limits")

    eventually(whole, "Flower does not know what the worker can", seconds=SECONDS)
    assert "/s" in _text(browser, "#tab-limits")
    assert all(queue in _text(browser, "#tab-queues") for queue in ("high", "medium", "low"))
    for order in ("worker-group", "worker-pool-grow", "worker-add-consumer", f"task-rate-limit-{limited.id}"):
        assert not browser.find_elements(By.ID, order), order


def test_tables_in_a_terminal(up: UpNode, platform: Platform, jobs: list[Job], tmp_path: Path) -> None:
    retrying = jobs[-2]
    commands = ("nodes", "beats", f"jobs list --user {retrying.user} --limit 4", f"jobs show {retrying.id}")
    shown = "".join(f"$ taskplatform {command}\n{_typed(up, command)}\n" for command in commands)
    for wanted in (*(worker.id for worker in platform.workers()), "beat@", "daily_user_report", "retrying", "assigned"):
        assert wanted in shown
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(shown))
    # without the fonts that it would fetch from elsewhere
    plain = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    picture = console.export_svg(title="taskplatform", code_format=plain)
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
    assert len(picture) < MOST_BYTES
    _at("terminal.svg", tmp_path).write_text(picture, encoding="utf-8")


def _typed(up: UpNode, command: str) -> str:
    """What the command shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    given = {name: value for name, value in up.environment.items() if not name.startswith("TASKPLATFORM_")}
    environment = {**given, "TASKPLATFORM_REDIS_URL": up.address("Redis"), "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    environment |= {"API_BASE_URL": up.address("Mock API"), "API_TOKEN": "token"}
    process = subprocess.Popen([REAL_COMMAND, *command.split()], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = bytearray()
    with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # Linux says EIO where the other end is closed
        while data := terminal.read(65_536):
            seen += data
    assert process.wait(SECONDS) == 0, seen
    return seen.decode().replace("\r\n", "\n")


# --- the dashboard ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key(platform: Platform) -> str:
    return platform.store.access.create_key("ops", {"admin"}, actor="test", log_size=1000)[1]


class Dashboard:
    """The dashboard in the browser, in which somebody is signed in."""

    def __init__(self, browser: webdriver.Chrome, url: str, key: str) -> None:
        self.browser = browser
        self.url = url.rstrip("/")
        self._key = key

    def open(self, path: str = "/") -> None:
        """A page, with the key where it is asked for."""
        self.browser.get(self.url + path)
        if self.browser.find_elements(By.ID, "key"):
            self.browser.find_element(By.ID, "key").send_keys(self._key, Keys.ENTER)
            eventually(lambda: not self.browser.find_elements(By.ID, "key"), "nobody is signed in", seconds=SECONDS)
        assert self.browser.current_url == self.url + path

    def click(self, name: str) -> None:
        """What people find under this name. The page that comes of it is there then."""
        before = self.browser.find_element(By.TAG_NAME, "html")
        found = self.browser.find_elements(By.CSS_SELECTOR, f'[aria-label="{name}"]') or self.browser.find_elements(
            By.XPATH, f'//a[normalize-space()="{name}"]|//button[normalize-space()="{name}"]'
        )
        assert found, f"nothing is called {name!r} on\n{self.text}"
        found[0].click()
        # between two pages there is none
        eventually(lambda: self.browser.find_elements(By.TAG_NAME, "html") not in ([], [before]), "no page comes", seconds=SECONDS)

    @property
    def text(self) -> str:
        """What is to be read on the page."""
        return str(self.browser.find_element(By.TAG_NAME, "body").text)

    def size(self, width: int = 1280, height: int = 900, *, phone: bool = False) -> None:
        """Show it on a screen of so many CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def picture(self, name: str, tmp_path: Path, *, scale: float) -> None:
        """Of the page's upper part, with so many pixels for each of the screen's."""
        width, height = self.browser.execute_script("return [innerWidth, innerHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
        taken = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        data = base64.b64decode(taken["data"])
        assert 10_000 < len(data) < MOST_BYTES, f"{name} has {len(data)} bytes"
        _at(name, tmp_path).write_bytes(data)

    def faults(self) -> list[str]:
        """What the browser complained of since it was asked last, and what it asked others for."""
        said = [one["message"] for one in self._log("browser") if one["level"] in ("SEVERE", "WARNING")]
        events = [json.loads(one["message"])["message"] for one in self._log("performance")]
        asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        own = self.url.removesuffix("/ui")
        return said + [url for url in asked if not url.startswith((f"{own}/ui", "data:"))]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        """What came since it was asked last."""
        return list(self.browser.get_log(kind))  # type: ignore[no-untyped-call]


@pytest.fixture
def dashboard(up: UpNode, browser: webdriver.Chrome, key: str) -> Iterator[Dashboard]:
    made = Dashboard(browser, up.address("Dashboard"), key)
    made.size()
    made.open()
    made.faults()  # of what was looked at before
    yield made
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def busy(platform: Platform) -> Iterator[None]:
    """While more is to be done than workers have slots for."""
    slots = sum(worker.slots for worker in platform.workers())
    made = [platform.enqueue("slot_drill", user="user1", params={"seconds": 300}, priority="high") for _ in range(slots + 2)]
    made += [platform.enqueue("hourly_data_sync", user="user3", priority=one) for one in ("medium", "low") for _ in range(9)]
    eventually(lambda: platform.store.running() >= slots, "not all slots are busy", seconds=SECONDS)
    yield
    for job in made:
        platform.cancel(job.id)
    eventually(lambda: platform.store.running() == 0, "they are not stopped", seconds=SECONDS)


def test_the_dashboard_fits_a_desk_and_a_phone_and_loads_nothing(
    dashboard: Dashboard, platform: Platform, jobs: list[Job], busy: None, tmp_path: Path
) -> None:
    platform.subscribe("user2", "daily_user_report", schedule={"timezone": "Europe/Berlin"})
    failed = platform.job(jobs[-1].id)
    pages = {
        "/": ("Health", *(worker.id for worker in platform.workers()), "leads", "high", "medium", "low", "taskplatform limits list"),
        "/definitions?q=daily_user": ("daily_user_report", "every day at"),
        f"/definitions/{failed.definition}": (failed.reason, "Occurrences"),
        "/users/user2": ("daily_user_report", jobs[-2].id.split(":")[2], "taskplatform users show user2"),
        "/users/user2/subscriptions/daily_user_report": ("daily_user_report for user2", "Europe/Berlin", "completed"),
        f"/jobs/{failed.id}": (failed.id, "Timeline", "assigned", "running", failed.reason),
        "/dead-letters": (failed.id.split(":")[2], "Redrive"),
        "/forecast": ("Forecast",),
        "/users/nobody": ("no user 'nobody'",),
    }
    for phone in (False, True):
        dashboard.size(*(PHONE if phone else (1280, 900)), phone=phone)
        for path, wanted in pages.items():
            dashboard.open(path)
            shown = dashboard.text
            assert all(one in shown for one in wanted), f"{path} lacks one of {wanted}:\n{shown}"
            inner, content = dashboard.browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
            assert inner == (PHONE[0] if phone else 1280), path
            assert content <= inner, f"{path} is {content} pixels wide on {inner}"
            if path == "/":
                dashboard.picture(f"dashboard{'-phone' if phone else ''}.png", tmp_path, scale=0.75 if phone else 1)
            faults = [one for one in dashboard.faults() if "/users/nobody" not in one]  # that is a 404, which it complains of
            assert faults == [], path


def test_why_a_users_report_did_not_run_is_two_steps_away(dashboard: Dashboard, platform: Platform, jobs: list[Job]) -> None:
    platform.create_user("4711")
    platform.subscribe("4711", "daily_user_report")
    dashboard.browser.find_element(By.ID, "find-user").send_keys("4711")
    dashboard.browser.find_element(By.ID, "find-definition").send_keys("daily_user_report")
    dashboard.click("Why, and when")
    assert "It runs every day at" in dashboard.text
    dashboard.click("Pause daily_user_report")
    assert platform.subscription("4711", "daily_user_report").paused
    assert "The subscription is paused." in dashboard.text
    dashboard.click("Resume daily_user_report")
    assert not platform.subscription("4711", "daily_user_report").paused
    assert {one.actor for one in platform.changes(about=["4711"], limit=2)} == {"ui:ops"}
    assert dashboard.faults() == []


def test_a_dead_letter_is_redriven_and_another_discarded(dashboard: Dashboard, platform: Platform, jobs: list[Job]) -> None:
    made = [platform.enqueue("slot_drill", user="user4", params={"seconds": "not a number"}) for _ in range(2)]
    eventually(lambda: all(platform.job(one.id).state is JobState.FAILED for one in made), "they do not fail", seconds=SECONDS)
    again, gone = (one.id for one in made)
    dashboard.open("/dead-letters?user=user4")
    dashboard.click(f"Redrive {again}")
    assert "Redriven" in dashboard.text
    assert "redriven by ui:ops" in [line.reason for line in platform.history(again)]
    dashboard.browser.find_element(By.CSS_SELECTOR, f'summary[aria-label="Discard {gone}"]').click()
    dashboard.browser.find_element(By.CSS_SELECTOR, "details[open] button").click()
    eventually(lambda: platform.store.jobs_by_id([gone]) == [], "it is still there", seconds=SECONDS)
    assert dashboard.faults() == []


def test_the_first_page_keeps_up_and_works_without_scripts(dashboard: Dashboard, platform: Platform) -> None:
    platform.pause_definition("monthly_cleanup", why="a test wants it")
    eventually(lambda: "a test wants it" in dashboard.text, "the page stays as it was", seconds=SECONDS)
    try:
        dashboard.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        dashboard.open("/definitions/monthly_cleanup")
        assert "a test wants it" in dashboard.text
        dashboard.click("Resume monthly_cleanup")
        assert platform.store.definition_pauses() == {}
    finally:
        dashboard.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        platform.resume_definition("monthly_cleanup")
    assert dashboard.faults() == []


def test_flower_and_the_dashboard_link_to_each_other(dashboard: Dashboard, flower: str, jobs: list[Job]) -> None:
    """Flower is another site, and a strict cookie does not come along over a link: who is signed in stays so all the same."""
    dashboard.browser.get(f"{flower}/task/{jobs[0].id}")
    dashboard.browser.find_element(By.LINK_TEXT, "Its whole history").click()
    eventually(lambda: "Timeline" in dashboard.text, "it does not lead to the job", seconds=SECONDS)
    assert dashboard.browser.current_url == f"{dashboard.url}/jobs/{quote(jobs[0].id, safe='')}"
    dashboard.click("what Celery saw of it")
    assert dashboard.browser.current_url == f"{flower}/task/{jobs[0].id}"


def test_who_signs_out_sees_nothing_more(dashboard: Dashboard) -> None:
    dashboard.click("Sign out")
    dashboard.browser.get(f"{dashboard.url}/dead-letters")
    assert dashboard.browser.find_elements(By.ID, "key")

    def nothing_shown() -> bool:
        elsewhere = not dashboard.browser.current_url.startswith(dashboard.url)  # Flower, where tests before this one were
        return elsewhere or bool(dashboard.browser.find_elements(By.ID, "key"))

    for _ in range(3):  # to where the pages were
        dashboard.browser.back()
        eventually(nothing_shown, "a page is still shown", seconds=SECONDS)
