"""A service as a process: it says once why it cannot start and ends; told to stop, it is gone in time."""

import contextlib
import os
import signal
import sqlite3
import threading
import time

import httpx
import psutil
import pytest

from bentos.launch import serve
from patches.families import llm
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from tests.bench.server import end, running

from .conftest import CONFIGS, SYSTEM, seal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_service_that_cannot_start_says_why_once_and_ends(home, capfd, monkeypatch):
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PATCHBAY_BASE", "tiny")
    ledgers.promote(Ledger(), SYSTEM, seal(llm.tiny(7), CONFIGS[0]))  # of another base
    process = serve(SYSTEM, port=0, background=True)
    try:
        process.wait(timeout=90)
    finally:
        end(process)
    said = capfd.readouterr()
    assert (said.out + said.err).count("patchbay cannot serve") == 1
    assert "was made from tiny:7" in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_told_to_stop_is_gone_though_its_log_hangs(home, tiny_llm, number):
    home.mkdir(parents=True, exist_ok=True)
    made = [seal(tiny_llm, c) for c in CONFIGS[:2]]
    ledgers.promote(Ledger(), SYSTEM, made[0])
    x = experiments.begin(SYSTEM, control=made[0], treatment=made[1], share=0.5)
    ledgers.split(Ledger(), SYSTEM, experiments.plain(x))
    with running(SYSTEM, PATCHBAY_BASE="tiny") as server:
        tree = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        lock = sqlite3.connect(home / "events.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True, "ignore_eos": True}

        def call():
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/v1/chat/completions", json=ask, timeout=30)

        callers = [threading.Thread(target=call, daemon=True) for _ in range(8)]
        for c in callers:
            c.start()
        time.sleep(0.5)
        start = time.monotonic()
        os.kill(server.pid, number)
        left = psutil.wait_procs(tree, timeout=30)[1]
        took = time.monotonic() - start
        lock.close()
        assert not left
        assert took < 12, took
