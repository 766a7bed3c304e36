"""MLflow is killed in the middle of its work: the ledger is still the truth, and nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from registry import cli, manifest, store
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import NotReady
from registry.store import mlflow_client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SYSTEM = "attention_sink"
BASE = "b" * 64
SIDES = {"base": {"quality/accuracy": 0.5}, "patched": {"quality/accuracy": 0.4}}


class Server:
    """An MLflow server in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Seconds until it answers."""
        begun = time.monotonic()
        where = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        where += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1", *where]
        self.process = subprocess.Popen(command, start_new_session=True)
        while time.monotonic() - begun < 300:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return time.monotonic() - begun
            time.sleep(0.05)
        raise TimeoutError("MLflow did not start")

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.url)
    try:
        yield made
    finally:
        made.kill()
        mlflow.set_tracking_uri(None)


@pytest.fixture
def seal(tmp_path: Path) -> Callable[[int], Path]:
    def seal(value: int) -> Path:
        folder = tmp_path / "made" / str(value)
        folder.mkdir(parents=True)
        save_file({"value": np.full(3, value, dtype=np.float32)}, folder / "patch.safetensors")
        manifest.write(folder, kind="patch", system=SYSTEM, base=f"pypi:smollm2@{BASE}", config={})
        return folder

    return seal


def test_mlflow_killed_while_pushing_loses_nothing_acknowledged_and_the_ledger_goes_on(
    server: Server, seal: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    ledger, folders = Ledger(), [seal(i) for i in range(40)]
    digests = [manifest.read(f).digest for f in folders]
    pushed: list[store.Pushed] = []
    refused: list[NotReady] = []

    def work() -> None:
        for folder in folders:
            try:
                pushed.append(store.push(folder, metrics=SIDES))
            except NotReady as e:
                refused.append(e)
                return

    pusher = threading.Thread(target=work)
    pusher.start()
    while len(pushed) < 2:
        time.sleep(0.01)
    time.sleep(0.3)  # into the middle of the third or fourth
    server.kill()
    killed = time.monotonic()
    pusher.join(timeout=120)
    assert refused, "every push was done before the kill; give it more to do"
    assert "Check MLFLOW_TRACKING_URI" in str(refused[0])
    print(f"\nthe push noticed after {time.monotonic() - killed:.1f} s: {refused[0]}")

    # while MLflow is away: who is live is decided, followed, and rolled back; artifacts are read and verified here
    acknowledged = [p.digest for p in pushed]
    ledgers.promote(ledger, SYSTEM, acknowledged[0])
    assert cli.main(["promote", f"sha256:{acknowledged[1]}"]) == 1, "it has been through no gate"
    assert cli.main(["promote", f"sha256:{acknowledged[1]}", "--force", "MLflow is away"]) == 0
    assert "lag behind the ledger" in capsys.readouterr().out
    assert ledger.head(SYSTEM).champion == acknowledged[1]
    assert cli.main(["rollback", SYSTEM]) == 0
    assert ledger.head(SYSTEM).champion == acknowledged[0]
    assert all(manifest.read(store.pull(d)).digest == d for d in acknowledged)
    assert ledger.verify() == 3

    back = server.start()
    again = time.monotonic()
    broken = len(acknowledged)  # the push that died
    store.push(folders[broken], metrics=SIDES)
    recovered = time.monotonic() - again
    assert store.mirror(SYSTEM, acknowledged[0], None) is None
    rows = {r.digest: r for r in store.list_models(SYSTEM)}
    assert set(acknowledged) | {digests[broken]} == rows.keys()
    assert all(r.metrics == {"quality/accuracy": 0.4} for r in rows.values())
    assert f"{SYSTEM}-champion" in rows[acknowledged[0]].aliases
    assert len(mlflow_client.versions(f"tags.`patch.digest` = '{digests[broken]}'")) == 1
    print(f"MLflow back after {back:.1f} s; the push that died was done again in {recovered:.1f} s")
