"""A whole deployment on one machine: MLflow with logins, services, and nginx before them, started and watched.

MLflow keeps its tables in PATCHBAY_DB and its files in PATCHBAY_STORE, or both in the home where these are not set; it
hands files through, so that callers need no key of the store. A process that ends is started again; one that ends again
and again ends everything, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bentos.launch import serve
from bentos.tokens import Tokens
from bentos.up import proxy
from registry import bucket
from registry.ab.database import ENV, driven
from registry.errors import ConfigError, NotReady
from registry.home import home
from registry.systems import system

READY_S, STOP_S, LOOK_S = 600.0, 15.0, 0.5
"""Longest wait in seconds for a process to answer and to end, and the interval of looking after them"""
ENDS, ENDS_S = 5, 60.0
"""A process that ends so often within so many seconds is given up"""
ADMIN = "admin"
SECRETS = "secrets.json"


@dataclass
class Part:
    """One process of the deployment."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    health: str
    """address that answers 200 once the process works"""
    process: subprocess.Popen[bytes] | None = None
    ended: list[float] = field(default_factory=list)
    """when it ended, of late"""

    def answers(self) -> bool:
        """Whether it works."""
        try:
            with urllib.request.urlopen(self.health, timeout=2) as got:
                return bool(got.status == 200)
        except (OSError, ValueError):
            return False


class Stack:
    """The processes of a deployment. A context manager: leaving it ends all of them."""

    def __init__(self, systems: Sequence[str], host: str, port: int, replicas: int = 1) -> None:
        """Raises ConfigError for a host that others can reach while callers have no tokens, NotFound without nginx."""
        Tokens.from_environment().check_host(host)
        if not 1 <= replicas <= 64:
            raise ConfigError(f"--replicas {replicas} is none; say a number from 1 to 64.")
        names = [system(name).name for name in systems]
        self.nginx = proxy.binary()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.folder = home() / "up"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.known = _secrets(self.folder / SECRETS)
        ports = _free(1 + replicas * len(names))
        self.mlflow = f"http://127.0.0.1:{ports[0]}/mlflow"
        self.parts = [Part("mlflow", self._mlflow(ports[0]), f"{self.mlflow}/health")]
        served: dict[str, list[int]] = {name: [] for name in names}
        for name, p in zip([n for n in names for _ in range(replicas)], ports[1:], strict=True):
            served[name].append(p)
            self.parts.append(Part(f"{name}-{p}", self._service(name, p), f"http://127.0.0.1:{p}/readyz"))
        written = proxy.config(self.folder, host, port, served, ports[0], trusted=_local(host))
        (self.folder / "nginx.conf").write_text(written)
        self.parts.append(Part("nginx", self._nginx, f"{self.url}/mlflow/health"))

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, ended: Callable[[], bool] = lambda: False) -> None:
        """Start everything, MLflow first, unless somebody has `ended` it meanwhile.

        Raises NotReady for what does not come up, with the end of its log.
        """
        for part in self.parts:
            if not ended():
                part.process = part.start()
            if part.name == "mlflow":
                self._until_up(part, ended)
        for part in self.parts[1:]:
            self._until_up(part, ended)

    def watch(self, until: Callable[[], bool]) -> None:
        """Start again what ends, until `until` says so. Raises NotReady for what ends again and again."""
        while not until():
            for part in self.parts:
                if part.process is not None and part.process.poll() is not None:
                    now = time.monotonic()
                    part.ended = [at for at in part.ended if now - at < ENDS_S] + [now]
                    if len(part.ended) > ENDS:
                        raise NotReady(self._why(part, f"ended {len(part.ended)} times within {ENDS_S:.0f} s"))
                    part.process = part.start()
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """End everything, nginx first, within STOP_S; what hangs is killed."""
        running = [p.process for p in reversed(self.parts) if p.process is not None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for part in self.parts:
            part.process = None

    def told(self) -> str:
        """For whoever started it: where everything is."""
        services = [f"  {name:16}{self.url}/{name}/" for name in dict.fromkeys(p.name.rpartition("-")[0]
                    for p in self.parts[1:-1])]  # fmt: skip
        return "\n".join([
            f"up: {self.url}",
            f"  {'mlflow':16}{self.url}/mlflow/  (user {ADMIN}, password in {self.folder / SECRETS})",
            *services,
            f"  here: export MLFLOW_TRACKING_URI={self.url}/mlflow MLFLOW_TRACKING_USERNAME={ADMIN} "
            "MLFLOW_TRACKING_PASSWORD=...",
        ])  # fmt: skip

    def _until_up(self, part: Part, ended: Callable[[], bool]) -> None:
        end = time.monotonic() + READY_S
        while not ended() and not part.answers():
            assert part.process is not None
            if part.process.poll() is not None:
                raise NotReady(self._why(part, f"ended with exit status {part.process.returncode}"))
            if time.monotonic() > end:
                raise NotReady(self._why(part, f"does not answer within {READY_S:.0f} s"))
            time.sleep(0.2)

    def _why(self, part: Part, what: str) -> str:
        log = self.folder / f"{part.name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"{part.name} {what}: {last[0][:300]} (all of it: {log})"

    # ---- the processes -------------------------------------------------------------------------------------------

    def _mlflow(self, port: int) -> Callable[[], subprocess.Popen[bytes]]:
        place = bucket.address()
        files = f"{place}mlflow" if place else str(home() / "mlartifacts")
        tables = driven(os.environ[ENV]) if os.environ.get(ENV) else f"sqlite:///{home() / 'mlflow.db'}"
        logins = driven(os.environ[ENV]) if os.environ.get(ENV) else f"sqlite:///{self.folder / 'logins.db'}"
        ini = self.folder / "logins.ini"
        with _private(ini) as f:
            f.write(
                "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
                f"database_uri = {logins.replace('%', '%%')}\nadmin_username = {ADMIN}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
        command = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1", "--static-prefix", "/mlflow", "--serve-artifacts",
            "--artifacts-destination", files, "--allowed-hosts", "*",  # nginx and its host stand before it
        ]  # fmt: skip
        env = {
            "MLFLOW_BACKEND_STORE_URI": tables,  # not among the words, which every process of the machine may read
            "MLFLOW_AUTH_CONFIG_PATH": str(ini), "MLFLOW_AUTH_ADMIN_PASSWORD": self.known["password"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.known["key"], "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }  # fmt: skip
        return lambda: self._run("mlflow", command, env)

    def _service(self, name: str, port: int) -> Callable[[], subprocess.Popen[bytes]]:
        given = {
            "MLFLOW_TRACKING_URI": self.mlflow, "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.known["password"],
        }  # fmt: skip

        def start() -> subprocess.Popen[bytes]:
            with self._log(f"{name}-{port}") as log:
                return serve(name, port=port, background=True, given=given, log=log, watched=True)

        return start

    def _nginx(self) -> subprocess.Popen[bytes]:
        where = ["-p", str(self.folder), "-e", "stderr", "-c", str(self.folder / "nginx.conf")]
        return self._run("nginx", [*self.nginx, *where], {})

    def _run(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # mlflow starts uvicorn by name
        with self._log(name) as log:
            settings = {**os.environ, "PATH": path, **env}
            return subprocess.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[int]:
        """A file in the folder that a process writes on, as a descriptor."""
        with (self.folder / f"{name}.log").open("ab") as f:
            yield f.fileno()


def _local(host: str) -> bool:
    return host in ("127.0.0.1", "::1", "localhost")


def _secrets(file: Path) -> dict[str, str]:
    """MLflow's password and the key of its sessions: made once, readable by their owner alone."""
    if not file.is_file():
        with _private(file) as f:
            f.write(json.dumps({"password": secrets.token_urlsafe(24), "key": secrets.token_urlsafe(32)}))
    known: dict[str, str] = json.loads(file.read_text())
    return known


@contextlib.contextmanager
def _private(file: Path) -> Iterator[TextIO]:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as f:
        yield f


def _free(n: int) -> list[int]:
    """Numbers of ports of this machine that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in made:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in made]
