"""A PostgreSQL of the tests' own: started once a run from the machine's package, a fresh database for whoever asks."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HINT = "PostgreSQL's server is not installed here (Debian: apt-get install postgresql)"
_NUMBERS = itertools.count()


def binaries() -> Path | None:
    """Where initdb and postgres lie; None if they are not installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[4]))
    return places[-1].parent if places else None


class Server:
    """A running server on a free port of this machine; everybody here may log in."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.data, self.programs, self.port = folder / "data", programs, _free()
        # the server refuses to run as root
        self.user = "postgres" if os.getuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user, pwd.getpwnam(self.user).pw_gid)
            folder.chmod(0o755)
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        log = str(self.data.parent / "log")
        self._run("pg_ctl", "-D", str(self.data), "-l", log, "-w", "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        """how: immediate is kill -9 with the children gone, too; fast lets sessions end."""
        self._run("pg_ctl", "-D", str(self.data), "-m", how, "-w", "stop")

    def database(self) -> str:
        """The URL of a new, empty database."""
        import psycopg

        name = f"t{os.getpid()}_{next(_NUMBERS)}"
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self.programs / program, *words], user=self.user, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False, cwd="/",
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr.strip()[-400:]}")


def _free() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server until the block ends. Skips, with the reason, where there is none or no driver."""
    pytest.importorskip("psycopg", reason="the driver comes with the extra `postgres`")
    programs = binaries()
    if programs is None:
        pytest.skip(HINT)
    folder = Path(tempfile.mkdtemp(prefix="patchbay-postgres-"))
    try:
        server = Server(folder, programs)
        try:
            yield server
        finally:
            with contextlib.suppress(RuntimeError):
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
