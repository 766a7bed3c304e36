"""Captions a minute: rounds shared by many pictures beside the published loop, same scorer, generator and rounds."""

from __future__ import annotations

import os
import time

import pytest
import torch

from patches.families.base import load_base
from patches.families.search.bank import bank
from patches.families.search.config import SearchConfig
from patches.families.search.generators import Mutation
from patches.families.search.loop import Item, Searcher
from patches.families.search.scorers import Clip
from training.mils.bank import lines
from training.mils.scenes import scenes

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
GENERATORS = ["mutation", *(["llm"] if os.environ.get("PATCHBAY_BENCH_LLM") else [])]
"""the language model takes minutes more: PATCHBAY_BENCH_LLM=1"""
ITEMS = {"official": 1, "shared": 16}


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(2)
    return load_base("lab:clip", "clip")


@pytest.mark.parametrize("generator", GENERATORS)
def bench_captions_a_minute(base, benchmark, generator):
    """At least five times those of the published loop; every run begins with nothing encoded."""
    many = bank(lines())
    model = None
    if generator == "llm":
        from patches.families.search.llm import LanguageModel

        model = LanguageModel(load_base("pypi:smollm2", "llm"))
    data = base.processor.image(scenes("test", ITEMS["shared"]).images)[:, None]

    def run(how):
        config = SearchConfig(generator=generator, how=how, keep=12, ask=12, steps=3)
        searcher = Searcher(config, many, Clip(base), model or Mutation(many))
        items = [Item(inputs={"pixels": x}, config=config, key=str(i)) for i, x in enumerate(data[: ITEMS[how]])]
        began = time.perf_counter()
        searcher.run(items)
        return 60 * len(items) / (time.perf_counter() - began)

    torch.set_grad_enabled(False)
    times = interleave({how: lambda how=how: run(how) for how in ITEMS}, 2, warmup=0)
    an_item = {how: [t / ITEMS[how] for t in times[how]] for how in ITEMS}
    got = ratio(an_item["official"], an_item["shared"])
    torch.set_grad_enabled(True)
    assert got.median >= 5.0
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        ratios={"shared over official": {"median": 1 / got.median}}, speedup=vars(got),
        throughput={"captions a minute": {"median": 60 / sorted(an_item["shared"])[0]}},
    )  # fmt: skip
