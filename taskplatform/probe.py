"""Whether a process answers that it is well: what a container's health check runs, every few seconds, so with little imported.

`python -m taskplatform.probe` asks `/ready` of the port that TASKPLATFORM_OPS_PORT names, on this machine; `--path` asks for another
path, and a URL for another place, also over https with the CA in `--ca`. It prints the answer and exits with 0 if it is of status
200, and with 1 if it is not, or if there is none within `--timeout` seconds.
"""

from __future__ import annotations

import os
import socket
import sys
from argparse import ArgumentParser
from contextlib import closing

_MOST_BYTES = 65_536


def ask(url: str, *, ca: str | None = None, timeout: float = 8.0) -> tuple[int, str]:
    """The status and the body of the answer to a GET, which is read to its 64th kilobyte.

    `timeout` is in seconds, for each step. Raises OSError where there is no answer, and ValueError where it is none of HTTP.
    """
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    host, _, port = place.rpartition(":")
    if scheme not in ("http", "https") or not host or not port.isdigit():
        raise ValueError(f"{url!r}: a URL such as http://127.0.0.1:8090/ready is expected")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout)
    if scheme == "https":
        import ssl

        connection = ssl.create_default_context(cafile=ca).wrap_socket(connection, server_hostname=host.strip("[]"))
    with closing(connection):
        # not http.client, which takes longer to import than all else here
        connection.sendall(f"GET {slash}{path} HTTP/1.0\r\nHost: {place}\r\nAccept: */*\r\n\r\n".encode())
        answer = b""
        while len(answer) < _MOST_BYTES and (piece := connection.recv(_MOST_BYTES)):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError(f"{url} did not answer in HTTP")
    return int(words[1]), body.decode(errors="replace").strip()


def main() -> int:
    """The command. Returns the exit code."""
    parser = ArgumentParser(prog="python -m taskplatform.probe", description="Ask a process whether it is well.")
    parser.add_argument("url", nargs="?", help="default: http://127.0.0.1:PORT/ready, with the port of TASKPLATFORM_OPS_PORT")
    parser.add_argument("--path", default="/ready", help="another path, where no URL is given")
    parser.add_argument("--ca", metavar="FILE", help="PEM file of the CA for https")
    parser.add_argument("--timeout", type=float, default=8.0, metavar="SECONDS", help="for each step; default: %(default)s")
    given = parser.parse_args()
    port = os.environ.get("TASKPLATFORM_OPS_PORT", "").strip()
    if given.url is None and (not port.isdigit() or port == "0"):
        parser.error(f"TASKPLATFORM_OPS_PORT is {port!r}, which is not one port: set it, or give a URL")
    try:
        status, body = ask(given.url or f"http://127.0.0.1:{port}{given.path}", ca=given.ca, timeout=given.timeout)
    except (OSError, ValueError) as fault:
        print(f"no answer: {fault}")
        return 1
    print(body if status == 200 else f"{status}: {body}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
