"""A real server in a process of its own, on a free port of this machine, ended with all its children."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from bentos.launch import KEEP_ALIVE_S, serve
from registry.systems import system as system_row

ROOT = Path(__file__).parent.parent.parent
Kind = Literal["typed", "serve", "bentoml", "uvicorn", "floor"]
APPLICATIONS = {"uvicorn": "bentos.app:application", "floor": "tests.bench.floor:application"}
BENTOML = ("bentoml", "serve", "bentos.service:Patchbay")

DOT = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mOsqKhgIAUwMZAIRjWMahg6GgB//AGIMoiFLAAAAABJRU5ErkJggg=="
FIRST: dict[str, tuple[str, dict[str, Any]]] = {
    "llm": (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1},
    ),
    "clip": ("/v1/classify", {"model": "base", "images": [{"data": DOT}], "labels": ["cat", "dog"]}),
}
"""the first question, by family"""


@dataclass
class Server:
    """A running service. Times are seconds from the start of its process."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float
    """until /readyz said 200"""
    answer_s: float
    """until the first answer"""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def worker(self) -> int:
        """The process that decodes: the largest of the tree."""
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        return int(max(processes, key=lambda p: p.memory_info().rss).pid)

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Until /readyz says 200. Raises if the process ends before."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode} before it was ready")
            time.sleep(0.02)
        raise TimeoutError(f"not ready within {timeout_s:g} s")


@contextlib.contextmanager
def running(system: str, *, kind: Kind = "serve", **env: str) -> Iterator[Server]:
    """The service of `system` as `patchbay serve` starts it, or by that command itself (typed), or under BentoML, plain
    uvicorn, or the least there is.

    env: more environment; PATCHBAY_HOME is this process's own unless it is named.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = time.monotonic()
    with _environment(env):
        if kind == "serve":
            process = serve(system, port=port, background=True)
        elif kind == "typed":
            command = [sys.executable, "-m", "registry.cli", "serve", system, "--port", str(port)]
            process = subprocess.Popen(command, cwd=ROOT)
        elif kind == "bentoml":
            words = ["--port", str(port), "--host", "127.0.0.1", "--timeout-keep-alive", str(KEEP_ALIVE_S)]
            settings = {**os.environ, "PATCHBAY_SYSTEM": system}
            process = subprocess.Popen([sys.executable, "-m", *BENTOML, *words], env=settings, cwd=ROOT)
        else:
            command = [
                sys.executable, "-m", "uvicorn", "--factory", APPLICATIONS[kind], "--port", str(port),
                "--no-access-log", "--log-level", "warning", "--timeout-keep-alive", str(KEEP_ALIVE_S),
            ]  # fmt: skip
            process = subprocess.Popen(command, env={**os.environ, "PATCHBAY_SYSTEM": system}, cwd=ROOT)
    server = Server(f"http://127.0.0.1:{port}", process, 0.0, 0.0)
    try:
        server.wait_ready()
        server.ready_s = time.monotonic() - start
        path, ask = FIRST["llm" if system_row(system).family == "llm" else "clip"]
        httpx.post(server.url + path, json=ask, timeout=60).raise_for_status()
        server.answer_s = time.monotonic() - start
        yield server
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and whatever it left behind."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    for child in [*children, process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            child.kill()
    process.wait()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
