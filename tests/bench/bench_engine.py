"""What a patch costs in process: base, patched and folded interleaved in one run; many arms in one batch.

On what conftest.py names. Ratios only; `make bench` prints them and keeps them with the version.
"""

import resource

import pytest
import torch

from patches.engine.patch import apply
from patches.families.llm.worker import Decoder, Row
from patches.mechanisms.sink import SinkConfig, SinkEdit

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def base(subject):
    return subject.base


def prompts(base, count, tokens):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(3, min(40_000, base.model.config.vocab_size), (count, tokens), generator=rng).to(base.device)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [64, 512])
def bench_prefill(subject, base, benchmark, tokens):
    """One prompt through the model."""
    ids = prompts(base, 1, tokens)
    model = base.model
    folded = subject.foldable.fold(model) if subject.foldable else None
    with apply(model, {"patch": subject.patch}, root=base.root) as on:

        def run(arm):
            with on.rows([arm]):
                return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        def fold():
            return folded(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        variants = {
            "base": lambda: run(None),
            "base again": lambda: run(None),
            "patched": lambda: run("patch"),
        } | ({"folded": fold} if folded else {})
        want = run(None)
        times = interleave(variants, rounds=20 if tokens > 100 else 60)
        assert torch.equal(run(None), want)
        out = {name: ratio(t, times["base"]) for name, t in times.items()}
        benchmark.pedantic(lambda: run("patch"), rounds=3)
    subject.about(benchmark, tokens=tokens, ratios={k: vars(v) for k, v in out.items()})
    print(f"\nprefill {tokens}:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})


def decode(base, on, ids, arms, tokens):
    rows = [Row(p, arm=a, max_tokens=tokens, ignore_eos=True) for p, a in zip(ids, arms, strict=True)]
    Decoder(base, on, slots=len(rows)).run(rows)
    return [r.out for r in rows]


def bench_decode(subject, base, benchmark):
    """One row, token by token."""
    ids = prompts(base, 1, 32).tolist()
    with apply(base.model, {"patch": subject.patch}, root=base.root) as on:
        want = decode(base, on, ids, [None], 24)
        variants = {
            "base": lambda: decode(base, on, ids, [None], 24),
            "base again": lambda: decode(base, on, ids, [None], 24),
            "patched": lambda: decode(base, on, ids, ["patch"], 24),
        }
        times = interleave(variants, rounds=15, warmup=2)
        assert decode(base, on, ids, [None], 24) == want
        out = {name: ratio(t, times["base"]) for name, t in times.items()}
        benchmark.pedantic(variants["patched"], rounds=2)
    subject.about(benchmark, ratios={k: vars(v) for k, v in out.items()})
    print("\ndecode:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def bench_arms(subject, base, benchmark, count):
    """`count` different patches in one batch of as many rows, against the same batch of base rows."""
    ids = prompts(base, count, 24).tolist()
    config = base.model.config
    layers = (1, 2, min(11, config.num_hidden_layers - 1))
    neurons = [tuple({(at, i % config.intermediate_size) for at in layers}) for i in range(count)]
    arms = {f"a{i}": SinkEdit(SinkConfig(neurons=n, damp_layers=(0,)), {}) for i, n in enumerate(neurons)}
    tokens = 12 if count < 64 else 6
    with apply(base.model, arms, root=base.root) as on:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        want = decode(base, on, ids, [None] * count, tokens)
        variants = {
            "base": lambda: decode(base, on, ids, [None] * count, tokens),
            "base again": lambda: decode(base, on, ids, [None] * count, tokens),
            "one arm": lambda: decode(base, on, ids, ["a0"] * count, tokens),
            "arms": lambda: decode(base, on, ids, list(arms), tokens),
        }
        middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = interleave(variants, rounds=8 if count < 64 else 5, warmup=1)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert decode(base, on, ids, [None] * count, tokens) == want
        out = {name: ratio(times["base"], t) for name, t in times.items()}
        benchmark.pedantic(variants["arms"], rounds=1)
    subject.about(
        benchmark, arms=count, throughput={k: vars(v) for k, v in out.items()}, rss_kb=[before, middle, after]
    )
    print(
        f"\n{count} arms, throughput of base = 1:",
        {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()},
        f"peak memory {after / middle - 1:+.2%}",
    )
