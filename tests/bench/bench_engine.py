"""What a patch costs in process: base, patched and folded interleaved in one run; many arms in one batch.

On SmolLM2 if its wheel is there. Ratios only; `make bench` prints them and keeps them with the version.
"""

import platform
import resource

import pytest
import torch

from patches.bases import llm
from patches.decode import Decoder, Row
from patches.patch import apply
from patches.sink import SinkConfig, SinkEdit

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

SINK = SinkConfig(neurons=((1, 83), (1, 1299), (2, 90), (2, 430), (11, 1229), (11, 1487)), damp_layers=(0,))
EVERYWHERE = SinkConfig(neurons=SINK.neurons, keep_first=False)


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(2)
    return llm.load("pypi:smollm2", "cuda" if torch.cuda.is_available() else "cpu")


def about(benchmark, base, **more):
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if base.device.type == "cuda" else platform.processor() or "cpu",
        threads=torch.get_num_threads(), torch=torch.__version__, dtype=str(base.model.dtype), base=base.digest, **more,
    )  # fmt: skip


def prompts(base, count, tokens):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(100, 40_000, (count, tokens), generator=rng).to(base.device)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [64, 512])
def bench_prefill(base, benchmark, tokens):
    """One prompt through the model."""
    ids = prompts(base, 1, tokens)
    model = base.model
    folded = SinkEdit(EVERYWHERE, {}).fold(model)
    with apply(model, {"sink": SinkEdit(SINK, {})}, root=base.root) as on:

        def run(arm):
            with on.rows([arm]):
                return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        def fold():
            return folded(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        variants = {
            "base": lambda: run(None),
            "base again": lambda: run(None),
            "patched": lambda: run("sink"),
            "folded": fold,
        }
        want = run(None)
        times = interleave(variants, rounds=20 if tokens > 100 else 60)
        assert torch.equal(run(None), want)
        out = {name: ratio(t, times["base"]) for name, t in times.items()}
        benchmark.pedantic(lambda: run("sink"), rounds=3)
    about(benchmark, base, tokens=tokens, ratios={k: vars(v) for k, v in out.items()})
    print(f"\nprefill {tokens}:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})


def decode(base, on, ids, arms, tokens):
    rows = [Row(p, arm=a, max_tokens=tokens, ignore_eos=True) for p, a in zip(ids, arms, strict=True)]
    Decoder(base, on, slots=len(rows)).run(rows)
    return [r.out for r in rows]


def bench_decode(base, benchmark):
    """One row, token by token."""
    ids = prompts(base, 1, 32).tolist()
    with apply(base.model, {"sink": SinkEdit(SINK, {})}, root=base.root) as on:
        want = decode(base, on, ids, [None], 24)
        variants = {
            "base": lambda: decode(base, on, ids, [None], 24),
            "base again": lambda: decode(base, on, ids, [None], 24),
            "patched": lambda: decode(base, on, ids, ["sink"], 24),
        }
        times = interleave(variants, rounds=15, warmup=2)
        assert decode(base, on, ids, [None], 24) == want
        out = {name: ratio(t, times["base"]) for name, t in times.items()}
        benchmark.pedantic(variants["patched"], rounds=2)
    about(benchmark, base, ratios={k: vars(v) for k, v in out.items()})
    print("\ndecode:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def bench_arms(base, benchmark, count):
    """`count` different patches in one batch of as many rows, against the same batch of base rows."""
    ids = prompts(base, count, 24).tolist()
    arms = {
        f"a{i}": SinkEdit(SinkConfig(neurons=((1, i), (2, i), (11, i)), damp_layers=(0,)), {}) for i in range(count)
    }
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
    about(benchmark, base, arms=count, throughput={k: vars(v) for k, v in out.items()}, rss_kb=[before, middle, after])
    print(
        f"\n{count} arms, throughput of base = 1:",
        {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()},
        f"peak memory {after / middle - 1:+.2%}",
    )
