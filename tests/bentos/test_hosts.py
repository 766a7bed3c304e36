"""The hosts of one application: the small parent of `patchbay serve`, BentoML's workers, Ray."""

import os
import signal
import time

import httpx
import psutil
import pytest

from bentos.hosted import device_of, workers
from bentos.launch import serve
from patches.families import llm
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import ConfigError, NotReady
from tests.bench.server import running

from .conftest import CONFIGS, SYSTEM, seal

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}


def test_each_worker_has_a_gpu_of_its_own_where_there_are_gpus():
    assert workers({}) == 1
    gpus = {"PATCHBAY_DEVICE": "cuda", "PATCHBAY_WORKERS": "2"}
    assert [device_of(n, gpus) for n in (1, 2)] == ["cuda:0", "cuda:1"]
    assert device_of(1, {"PATCHBAY_DEVICE": "cuda"}) == "cuda"
    assert [device_of(n, {"PATCHBAY_WORKERS": "2"}) for n in (1, 2)] == ["cpu", "cpu"]
    assert device_of(2, gpus | {"PATCHBAY_DEVICE": "cuda:0,cuda:1"}) == "cuda:0,cuda:1"  # one model over both


def test_every_device_is_checked_before_anything_starts(home, monkeypatch):
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PATCHBAY_BASE", "tiny")
    with pytest.raises(NotReady):
        serve(SYSTEM, port=0, background=True, given={"PATCHBAY_DEVICE": "cuda", "PATCHBAY_WORKERS": "64"})
    with pytest.raises(ConfigError, match="PATCHBAY_WORKERS='two'"):
        serve(SYSTEM, port=0, background=True, given={"PATCHBAY_WORKERS": "two"})


@pytest.mark.timeout(180)
def test_a_worker_that_is_killed_is_started_again_and_calls_wait_for_it(home, tiny_llm):
    home.mkdir(parents=True, exist_ok=True)
    ledgers.promote(Ledger(), SYSTEM, seal(tiny_llm, CONFIGS[0]))
    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        (worker,) = psutil.Process(server.pid).children()
        assert psutil.Process(server.pid).memory_info().rss < 60e6  # it holds no torch
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        got = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=120)
        assert got.status_code == 200
        assert [c.pid for c in psutil.Process(server.pid).children()] != [worker.pid]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_are_of_one_service(home):
    """BentoML's workers on one port: both answer as the ledger says, and one of them judges."""
    home.mkdir(parents=True, exist_ok=True)
    made = [seal(llm.tiny(), c) for c in CONFIGS[:2]]
    ledgers.promote(Ledger(), SYSTEM, made[0])
    with running(SYSTEM, PATCHBAY_BASE="tiny", PATCHBAY_WORKERS="2") as server:
        answered, judges = set(), set()
        end = time.monotonic() + 60
        while len(answered) < 2 and time.monotonic() < end:
            got = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)  # a connection each
            assert got.headers["x-patchbay-patch"] == made[0]
            answered.add(got.headers["x-patchbay-request"][:8])
            judges.add(httpx.get(f"{server.url}/v1/models", timeout=60).json()["patchbay"]["judge"])
        assert len(answered) == 2
        time.sleep(2)
        for _ in range(40):
            judges.add(httpx.get(f"{server.url}/v1/models", timeout=60).json()["patchbay"]["judge"])
        assert "this process" in judges
        assert len(judges - {None, "this process"}) == 1  # the other one names it
        ledgers.promote(Ledger(), SYSTEM, made[1])
        time.sleep(2)
        for _ in range(20):
            got = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)
            assert got.headers["x-patchbay-patch"] == made[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_serve_hosts_the_same_application(home, tiny_llm, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray comes with the extra `ray`")
    from ray import serve as host

    home.mkdir(parents=True, exist_ok=True)
    made = seal(tiny_llm, CONFIGS[0])
    ledgers.promote(Ledger(), SYSTEM, made)
    for name, value in {"PATCHBAY_SYSTEM": SYSTEM, "PATCHBAY_BASE": "tiny", "PATCHBAY_REPLICAS": "1"}.items():
        monkeypatch.setenv(name, value)
    from bentos import ray_serve
    from tests.bentos.test_build import free_port

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}})
    try:
        host.start(http_options={"host": "127.0.0.1", "port": port})
        host.run(ray_serve.bound())
        got = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=ASK, timeout=120)
        assert got.status_code == 200, got.text
        assert got.headers["x-patchbay-patch"] == made
    finally:
        host.shutdown()
        ray.shutdown()
