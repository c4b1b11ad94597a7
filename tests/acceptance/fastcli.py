"""`taskplatform` without the start of an interpreter for each call: a server that forks, and the program that asks it.

Documents have a hundred short commands, and most of a short command's time is its imports. What runs is the command itself, in a process
of its own with the caller's words, folder, environment and files. `python -m tests.acceptance.fastcli SOCKET` is the server, `PROGRAM`
what lies in PATH as `taskplatform`.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import signal
import socket
import struct
import sys
import traceback

#: For a Python without site packages. What serves until it is ended is run by itself, so that its signals are its own.
PROGRAM = """#!{python} -IS
import json, os, socket, struct, sys
if sys.argv[1:2] and sys.argv[1] in ("up", "api", "demo") and "--openapi" not in sys.argv:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [struct.pack("!I", len(told))], [0, 1, 2])
    server.sendall(told)
    code = server.recv(1)
sys.exit(code[0] if code else "the command ended without an exit code")
"""


def serve(path: str) -> None:
    """Until it is ended."""
    for name in ("api.application", "bulk", "catalogue", "health", "platform"):
        importlib.import_module(f"taskplatform.{name}")
    from taskplatform.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run(caller, main)
            caller.close()


def _run(caller: socket.socket, main: object) -> None:
    head, descriptors, _, _ = socket.recv_fds(caller, 4, 3)
    (size,) = struct.unpack("!I", head)
    told = b""
    while len(told) < size:
        told += caller.recv(size - len(told))
    words, folder, environment = json.loads(told)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    # what the server's own know of their files, such as that they can be sought in, does not hold any more
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 70
    try:
        assert callable(main)
        code = main(words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        caller.send(array.array("B", [code]).tobytes())
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
