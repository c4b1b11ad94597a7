"""`taskplatform up`, as README says to start it, for tests of what people see: its Flower has a login."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.acceptance.nodes import ProcessNode
from tests.support import wait_until

LOGIN = ("ops", "flower:pass-word")
REAL_COMMAND = str(Path(sys.executable).with_name("taskplatform"))
#: Of a busy machine.
READY_SECONDS = 120


class UpNode(ProcessNode):
    """The whole platform on this machine, with the shipped definitions, on ports that are free."""

    ready_prompt = "all is ready after"

    def __init__(self, *, environment: Mapping[str, str], folder: Path) -> None:
        own = {"TASKPLATFORM_DATA_DIR": str(folder / "data"), "TASKPLATFORM_FLOWER_LOGIN": ":".join(LOGIN)}
        given = {name: value for name, value in environment.items() if not name.startswith("TASKPLATFORM_")}
        super().__init__("up", [REAL_COMMAND, "up"], environment={**given, **own}, folder=folder)

    def started(self) -> UpNode:
        """Itself, when all of it is ready."""
        wait_until(lambda: self.is_ready() or self.status == "exited", seconds=READY_SECONDS, message=f"`up` is not ready:\n{self.logs()}")
        assert self.status == "running", self.logs()
        return self

    def address(self, what: str) -> str:
        """Of Redis, Mock API or Flower, as `up` tells it."""
        found = re.search(rf"\b{what} +(\S+://\S+)", self.logs())
        assert found, self.logs()
        return found[1]

    def stop(self, seconds: float = 40) -> None:
        """As Ctrl-C does."""
        super().stop(seconds)
