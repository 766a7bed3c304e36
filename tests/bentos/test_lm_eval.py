"""lm-eval's likelihood tasks over HTTP, by its own client: what it says of base and patch is what they compute."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import uvicorn

from bentos.app import application
from bentos.runtime import Settings
from bentos.tokens import Tokens
from patches import artifact
from patches.mechanisms.sink import SinkEdit
from patches.subject import Subject
from registry import store
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from tests.bench.likelihood import METRIC, items, measured
from tests.bentos.conftest import CONFIGS, SYSTEM

pytest.importorskip("lm_eval")
COUNT = 12


@pytest.fixture
def url(home, tiny_llm, tmp_path):
    """A service on a port, with a pushed patch as its champion."""
    about = artifact.save(SinkEdit(CONFIGS[0], {}), SYSTEM, tmp_path / "sealed", base=tiny_llm.label)
    store.push(tmp_path / "sealed")
    ledgers.promote(Ledger(), SYSTEM, about.digest)
    app = application(Settings(SYSTEM, base="tiny"), Tokens(None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", about.digest
    server.should_exit = True
    thread.join(20)


def test_lm_evals_client_scores_base_and_patch_and_mlflow_keeps_both(url, tiny_llm, tmp_path):
    address, digest = url
    tiny_llm.processor.save_pretrained(tmp_path / "tokenizer")
    patched = Subject(tiny_llm, {"a": SinkEdit(CONFIGS[0], {})})

    def scored(context: str, word: str, arm: str | None) -> float:
        """Log-likelihood of the word after the context, by one forward."""
        ids = tiny_llm.processor(context + " " + word)["input_ids"]
        start = len(tiny_llm.processor(context)["input_ids"])
        with torch.inference_mode():
            logits = patched(rows=[arm], input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logits[t - 1, ids[t]] for t in range(start, len(ids))))

    sides = {}
    for side, arm, name in (("base", None, "base"), ("patched", "a", "champion")):
        sides[side], raw = measured(address, name, tmp_path / "tokenizer", tmp_path, COUNT)
        true, right = [], []
        for q in items(COUNT):
            scores = [scored(q["context"], word, arm) for word in q["choices"]]
            true.append(scores[q["answer"]])
            right.append(max(range(4), key=scores.__getitem__) == q["answer"])
        got = sides[side][f"{METRIC}/loglikelihood"]
        assert got.value == pytest.approx(sum(true) / COUNT, abs=1e-3)
        assert raw["acc,none"] == pytest.approx(sum(right) / COUNT)
        assert sides[side][f"{METRIC}/accuracy"].n == COUNT
    patched.close()
    assert sides["base"][f"{METRIC}/loglikelihood"] != sides["patched"][f"{METRIC}/loglikelihood"]
    store.log_bench(digest, sides)
    kept = {r.metric: (r.a.value, r.b.value) for r in store.compare("base", digest).rows}
    for name, m in sides["base"].items():
        assert kept[name] == pytest.approx((m.value, sides["patched"][name].value))
