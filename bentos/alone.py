"""Serve the application under uvicorn, watched by a small parent: `python -m bentos.alone HOST PORT`.

What `patchbay serve` runs on one device. The parent holds the listening socket and imports nothing heavy: calls that
arrive while a worker that was killed is started again wait in the socket. A Bento is served by BentoML instead, whose
middlewares cost more per call than a small model (docs/log/house.md).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

WAITING = 2048
"""connections that may wait for a worker"""
AGAIN_S = 0.5
"""seconds until a worker that was killed is started again"""
LINUX_DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG"""


def watch(host: str, port: int) -> int:
    """Keep a worker on the socket until told to stop, or until it cannot start; return the exit status."""
    told: list[int] = []
    worker: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=WAITING) as listening:
        fd = listening.fileno()
        command = [sys.executable, "-m", "bentos.alone", "--fd", str(fd)]
        while not told:
            # a group of its own: a terminal's Ctrl-C comes from here, once
            worker = subprocess.Popen(command, pass_fds=[fd], start_new_session=True)
            if told:
                pass_on(told[-1], None)
            code = worker.wait()
            if told:
                return 0
            if code >= 0:  # by itself, and it has said why
                return code
            sys.stderr.write(f"the service was ended by signal {-code}; it is started again\n")
            sys.stderr.flush()
            time.sleep(AGAIN_S)
    return 0


def work(host: str, port: int, fd: int | None) -> int:
    """Serve on an open socket, or bind one once ready, until a signal says stop; return the exit status."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # other systems leave it to whoever kills the parent
        ctypes.CDLL(None).prctl(LINUX_DIES_WITH_PARENT, signal.SIGTERM)
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from bentos.connections import limit
    from bentos.hosted import hosted
    from bentos.launch import KEEP_ALIVE_S

    config = uvicorn.Config(
        hosted(lambda: True, parent=False), http=limit(AutoHTTPProtocol), log_config=None, access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S, server_header=False, lifespan="on", ws="none", backlog=WAITING,
        host=host, port=port,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=None if fd is None else [socket.socket(fileno=fd)])
    return 0 if server.started else 1


def main(words: list[str]) -> int:
    """As the parent with HOST PORT, as its worker with --fd N; with --once HOST PORT as a worker that somebody else
    watches, who sees by its port whether it is ready."""
    if words[:1] == ["--fd"]:
        return work("", 0, int(words[1]))
    if words[:1] == ["--once"]:
        return work(words[1], int(words[2]), None)
    return watch(words[0], int(words[1]))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code if 0 <= code < 256 else 1)
