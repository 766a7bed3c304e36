"""`patchbay up`: real MLflow, nginx and service processes on a real PostgreSQL and an S3-compatible store."""

import base64
import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

from bentos.up import Stack, proxy
from registry import cli
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import ConfigError, NotFound
from registry.home import home as place
from tests import s3
from tests.drill.replicas import until

from .conftest import CONFIGS, SYSTEM, seal
from .test_build import free_port

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}


def test_the_proxy_is_written_for_every_replica_and_nginx_reads_it(tmp_path):
    written = proxy.config(tmp_path, "127.0.0.1", 8080, {"clip_sae": [1001, 1002], "toto": [1003]}, 1004, trusted=True)
    assert written.count("server 127.0.0.1:1002 ") == 2
    assert written.count("{") == written.count("}")
    assert "X-Forwarded-For" not in written
    assert proxy.config(tmp_path, "::", 1, {"toto": [1]}, None, trusted=False).count("X-Forwarded-For $proxy_add") == 6
    (tmp_path / "nginx.conf").write_text(written)
    try:
        nginx = proxy.binary()
    except NotFound as e:
        pytest.skip(str(e))
    command = [*nginx, "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_a_host_that_others_reach_needs_tokens(home):
    with pytest.raises(ConfigError, match="PATCHBAY_TOKENS"):
        Stack([SYSTEM], "0.0.0.0", 8080)
    with pytest.raises(ConfigError, match="--replicas 0"):
        Stack([SYSTEM], "127.0.0.1", 8080, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_up_after_moving_the_embedded_default(home, tiny_llm, postgres, monkeypatch, capsys):
    """What was pushed into sqlite and a folder is in MLflow's own pages after, behind a login, and is served."""
    pytest.importorskip("flask_wtf", reason="MLflow's logins come with the extra `up`")
    home.mkdir(parents=True, exist_ok=True)
    one = seal(tiny_llm, CONFIGS[0])
    assert cli.main(["push", str(place() / "artifacts" / one)]) == 0
    ledgers.promote(Ledger(), SYSTEM, one)
    port = free_port()
    with s3.running() as store:
        for name, value in {**store.env, "PATCHBAY_DB": postgres.database(), "PATCHBAY_BASE": "tiny"}.items():
            monkeypatch.setenv(name, value)
        for module in (["registry.ab.migrate", os.environ["PATCHBAY_DB"]], ["registry.store.migrate"]):
            said = subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True, check=False)
            assert said.returncode == 0, said.stderr
        assert "1 artifacts" in said.stdout
        again = subprocess.run([sys.executable, "-m", "registry.store.migrate"], capture_output=True, text=True)
        assert again.returncode == 1
        assert "migrate into an empty one" in again.stderr
        (home / "artifacts" / one).rename(home / "moved-away")  # from now on it comes out of the store
        command = [sys.executable, "-m", "registry.cli", "up", SYSTEM, "--port", str(port), "--replicas", "2"]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert running.stdout.readline() == f"up: http://127.0.0.1:{port}\n"
            known = json.loads((home / "up" / "secrets.json").read_text())
            assert (home / "up" / "secrets.json").stat().st_mode & 0o077 == 0
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                for path in ("/v1/chat/completions", f"/{SYSTEM}/v1/chat/completions"):
                    got = http.post(path, json=ASK)
                    assert (got.status_code, got.headers["x-patchbay-patch"]) == (200, one), got.text
                large = http.post("/v1/chat/completions", json={**ASK, "user": "x" * (3 << 20)})
                assert large.status_code == 413, large.text  # the service's own word, not nginx's
                asked = "/mlflow/api/2.0/mlflow/registered-models/search"
                assert http.get(asked).status_code == 401
                login = base64.b64encode(f"admin:{known['password']}".encode()).decode()
                found = http.get(asked, headers={"authorization": f"Basic {login}"}).json()
                assert "tiny-0" in [m["name"] for m in found["registered_models"]]
            # a client elsewhere: its files come through the server, with a login and no key of the store
            env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PATCHBAY_STORE", "MLFLOW_"))}
            env |= {"PATCHBAY_HOME": str(home.parent / "elsewhere"), "MLFLOW_TRACKING_USERNAME": "admin",
                    "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}/mlflow",
                    "MLFLOW_TRACKING_PASSWORD": known["password"]}  # fmt: skip
            pull = [sys.executable, "-m", "registry.cli", "pull", f"{SYSTEM}@1"]
            said = subprocess.run(pull, env=env, capture_output=True, text=True, check=False)
            assert said.returncode == 0, said.stderr
            assert one in said.stdout
            # a replica that dies is started again, and nobody notices
            pids = {p.name: p.pid for p in _children(running.pid) if "bentos" in " ".join(p.cmdline())}
            assert pids
            os.kill(next(iter(pids.values())), signal.SIGKILL)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                assert [http.post("/v1/chat/completions", json=ASK).status_code for _ in range(20)] == [200] * 20
        finally:
            running.terminate()
            assert running.wait(timeout=60) == 0
        until(lambda: not _answers(port))


def _children(pid):
    import psutil

    return psutil.Process(pid).children(recursive=True)


def _answers(port):
    try:
        httpx.get(f"http://127.0.0.1:{port}/", timeout=2)
    except httpx.TransportError:
        return False
    return True
