"""The checks of the definitions' files, and of the hosts that they call."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

from taskplatform.addresses import AllowList
from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.visit import Visit

_SHOWN_FAULTS = 5
#: Name lookup, and then connecting.
_CONNECT_SECONDS = 3.0
_MOST_HOSTS = 64


def files(visit: Visit) -> Iterator[Finding]:
    """Whether the definitions here can be loaded, as a worker would."""
    catalogue, faults = visit.catalogue()
    visit.seen(f"{len(catalogue)} in {visit.settings.tasks_dir}")
    for fault in faults[:_SHOWN_FAULTS]:
        yield Finding(
            code="definition_fault",
            severity=Severity.WARNING,
            subject=fault.partition(" ")[0].rstrip(":"),
            what=fault,
            why="A worker or beat that starts here, with this environment, ends at once.",
            mend=_mend(fault),
        )
    if len(faults) > _SHOWN_FAULTS:
        yield Finding(
            code="definition_faults_more",
            severity=Severity.WARNING,
            subject="",
            what=f"{len(faults) - _SHOWN_FAULTS} faults more.",
            why="A worker or beat that starts here, with this environment, ends at once.",
            mend="taskplatform tasks check",
        )


def _mend(fault: str) -> str:
    variable = re.search(r"\$\{(\w+)\} is not in the environment", fault)
    return f"put {variable[1]}=… into .env or the environment; taskplatform tasks check" if variable else "taskplatform tasks check"


# --- hosts -----------------------------------------------------------------------------------------------------------


def hosts(visit: Visit) -> Iterator[Finding]:
    """Whether what the definitions call can be reached from here."""
    catalogue, _ = visit.catalogue()
    servers: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    unknown = 0
    for id_, definition in catalogue.items():
        if definition.config is None:
            continue
        server = definition.config.server(visit.environment)
        if server is None:
            unknown += 1
        else:
            servers[server].append(id_)
    if unknown:
        visit.seen(f"of {unknown} definitions the host is not known here")
    found: dict[tuple[str, int], str] = {}
    guard = AllowList(visit.settings.http_allow)
    chosen = sorted(servers)[:_MOST_HOSTS]
    threads = [threading.Thread(target=_try, args=(guard, server, found), name=f"doctor {server[0]}", daemon=True) for server in chosen]
    for thread in threads:
        thread.start()
    ends = min(visit.ends - 0.5, time.monotonic() + 2 * _CONNECT_SECONDS)
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    reached = [server for server in chosen if found.get(server) == ""]
    visit.seen(
        f"{len(reached)} of {len(chosen)} hosts reached"
        + (f", {len(servers) - len(chosen)} not tried" if len(servers) > len(chosen) else "")
    )
    for server in chosen:
        fault = found.get(server, "no answer in time")
        if fault:
            yield _unreachable(server, fault, servers[server])
    if not servers and unknown == 0:
        visit.seen("no definition calls one")
    yield from visit.health(lambda code: code in ("breaker_open", "host_held", "probe_stuck"))


def _unreachable(server: tuple[str, int], fault: str, ids: Sequence[str]) -> Finding:
    host, port = server
    shown = f"{f'[{host}]' if ':' in host else host}:{port}"
    others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    what = f"{shown}, which {ids[0]}{others} call, cannot be called: {fault}"
    if fault.startswith("address "):
        return Finding(
            code="host_refused",
            severity=Severity.CRITICAL,
            subject=shown,
            what=what,
            why="Each of these jobs fails for good, because the platform refuses the address.",
            mend=f"TASKPLATFORM_HTTP_ALLOW={shown}, if that is meant",
        )
    return Finding(
        code="host_unreachable",
        severity=Severity.WARNING,
        subject=shown,
        what=what,
        why="Each of these jobs fails and is tried again, if the workers' network is as that of this machine.",
        mend=f"curl -v telnet://{shown}; check name, network and the host itself",
    )


def _try(guard: AllowList, server: tuple[str, int], found: dict[tuple[str, int], str]) -> None:
    """Look the name up and connect, as a call would; sends nothing."""
    host, port = server
    fault = "the name has no address"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            text = str(address[0])
            refusal = guard.refusal(host, port, text)
            if refusal:
                fault = refusal
                continue
            with socket.socket(family, kind, protocol) as one:
                one.settimeout(_CONNECT_SECONDS)
                try:
                    one.connect(address)
                except OSError as problem:
                    fault = str(problem.strerror or problem).lower()
                else:
                    found[server] = ""
                    return
    except socket.gaierror as problem:
        fault = f"the name cannot be looked up: {problem.strerror}"
    except (OSError, UnicodeError) as problem:
        fault = str(problem)
    found[server] = fault
