"""What the served patch costs off its target: one of lm-eval's likelihood tasks over HTTP, on base and patched, put in
MLflow beside each other. On SmolLM2 with the sink patch, or on the pushed artifact that PATCHBAY_BENCH names."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from patches import artifact
from registry import store
from registry.ab import ledger as ledgers
from registry.ab.ledger import BASE, Ledger

from .conftest import Benched
from .likelihood import METRIC, items, measured
from .server import running

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
COUNT = int(os.environ.get("PATCHBAY_LM_EVAL", "360"))
"""questions; there are 360"""


def bench_lm_eval(subject: Benched, benchmark: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("lm-eval")
    subject.base.processor.save_pretrained(folder / "tokenizer")
    digest = os.environ.get("PATCHBAY_BENCH") or _pushed(subject)
    sides, raw = {}, {}
    with running(subject.system, PATCHBAY_BASE=subject.base.ref) as server:
        for side, arm in ((BASE, "base"), ("patched", f"sha256:{digest}")):
            sides[side], raw[side] = measured(server.url, arm, folder / "tokenizer", folder, COUNT)
    file = folder / "lm_eval.json"
    file.write_text(json.dumps({"n": min(COUNT, len(items(COUNT))), **raw}, default=str, indent=1))
    store.log_bench(digest, sides, file)
    benchmark.extra_info.update({s: {k: vars(m) for k, m in got.items()} for s, got in sides.items()})
    benchmark.pedantic(lambda: None, rounds=1)  # what was measured is no time
    for side, got in sides.items():
        for name, m in got.items():
            print(f"{side:8} {name.removeprefix(METRIC + '/'):14} {m.value:.4f} [{m.low:.4f}, {m.high:.4f}] n={m.n}")


def _pushed(subject: Benched) -> str:
    """The benchmark's own patch, sealed, pushed and made the challenger of this home."""
    with tempfile.TemporaryDirectory() as part:
        about = artifact.save(subject.patch, subject.system, Path(part) / "sealed", base=subject.base.label)
        store.push(Path(part) / "sealed")
    ledgers.challenge(Ledger(), subject.system, about.digest)
    return about.digest
