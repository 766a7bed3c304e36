"""What rows with different weights cost: eight identities in one batch beside eight pictures of one, or one by one.

make bench
"""

import copy
import time

import pytest
import torch
from torch import Generator

from patches.engine.patch import ONLY, apply
from patches.families.base import load_base
from patches.families.diffusion import Denoiser, Denoising
from patches.mechanisms.subspace import Point, linear_layers, low_rank, split, start
from patches.subject import Subject
from tests.patches.mechanisms.test_subspace import make
from training.w2w import subspace

pytestmark = pytest.mark.bench
ROWS = 8


def paired(one, other, rounds=9):
    """Median CPU seconds of two callables run in turn, and the median of their ratios (second over first)."""
    times = []
    one(), other()
    for _ in range(rounds):
        t0 = time.thread_time()
        one()
        t1 = time.thread_time()
        other()
        times.append((t1 - t0, time.thread_time() - t1))
    a, b = (torch.tensor(x).median().item() for x in zip(*times, strict=True))
    return a, b, torch.tensor([y / x for x, y in times]).median().item()


@pytest.fixture(scope="module")
def base():
    return load_base("lab:faces", "diffusion")


def rows(base, patch, asks, steps=10):
    told = base.model.text(["a smiling person"])[0]
    return [
        Denoising(condition=told, arm="a", params=patch.params(a, base), guidance=2.0, steps=steps, seed=i)
        for i, a in enumerate(asks)
    ]


def bench_eight_identities_beside_eight_pictures_of_one(base):
    """The worker's own path; limit 1.15."""
    torch.set_num_threads(1)
    patch = make(base.model, m=64)
    subject = Subject(base, {"a": patch})
    worker = Denoiser(subject)
    one, eight = [Point(seed=3)] * ROWS, [Point(seed=i) for i in range(ROWS)]
    a, b, ratio = paired(lambda: worker.run(rows(base, patch, one)), lambda: worker.run(rows(base, patch, eight)))
    print(f"\n8 pictures of one {1e3 * a:.0f} ms, of eight identities {1e3 * b:.0f} ms, ratio {ratio:.3f}")
    folded = Subject(patch.at(patch.point(one[0])) and base)  # the same base without arms: what no patch costs
    plain = Denoiser(folded)
    told = base.model.text(["a smiling person"])[0]
    none = [Denoising(condition=told, guidance=2.0, steps=10, seed=i) for i in range(ROWS)]
    c, d, more = paired(lambda: plain.run([copy.copy(r) for r in none]), lambda: worker.run(rows(base, patch, eight)))
    print(f"8 pictures of the base {1e3 * c:.0f} ms, of eight identities {1e3 * d:.0f} ms, ratio {more:.3f}")
    subject.close()
    folded.close()
    assert ratio <= 1.15


def bench_one_batch_beside_adapters_one_by_one(base):
    """Merging each identity's weights, drawing it alone, and taking it out again."""
    torch.set_num_threads(1)
    patch = make(base.model, m=64)
    subject = Subject(base, {"a": patch})
    worker = Denoiser(subject)
    asks = [Point(seed=i) for i in range(ROWS)]
    net = {x.site: base.model.get_submodule(x.site) for x in patch.config.layers}
    bare = Subject(base)
    alone = Denoiser(bare)
    told = base.model.text(["a smiling person"])[0]

    def one_by_one():
        for i, ask in enumerate(asks):
            kept = {k: m.weight.detach().clone() for k, m in net.items()}
            pairs = split(patch.config.layers, patch.decode(patch.point(ask)))
            for layer, (a, b) in zip(patch.config.layers, pairs, strict=True):
                net[layer.site].weight.data += patch.config.scale * b @ a
            alone.run([Denoising(condition=told, guidance=2.0, steps=10, seed=i)])
            for k, m in net.items():
                m.weight.data.copy_(kept[k])

    a, b, ratio = paired(lambda: worker.run(rows(base, patch, asks)), one_by_one, 5)
    print(f"\none batch of eight {1e3 * a:.0f} ms, one by one {1e3 * b:.0f} ms, ratio {ratio:.2f}")
    subject.close()
    bare.close()
    assert ratio > 1.0


def bench_closed_forms_of_a_row():
    """Decoded factors (two thin batched products) beside a principal basis shared by all rows, 320 channels."""
    torch.set_num_threads(1)
    g, d, m, tokens = Generator().manual_seed(0), 320, 64, 256
    x, beta = torch.randn(ROWS, tokens, d, generator=g), torch.randn(ROWS, m, generator=g)
    va, vb = torch.randn(m, d, generator=g), torch.randn(m, d, generator=g)

    def decoded():
        return low_rank(x, (beta @ va)[:, None], (beta @ vb)[..., None])

    def shared():
        h = ((x @ va.T) * beta[:, None]).sum(2, keepdim=True)
        return h * (beta @ vb)[:, None]

    torch.testing.assert_close(decoded(), shared(), atol=1e-1, rtol=1e-3)
    a, b, ratio = paired(decoded, shared, 15)
    print(f"\ndecoded {1e3 * a:.2f} ms, shared basis {1e3 * b:.2f} ms, ratio {ratio:.2f}")


def bench_many_adapters_trained_at_once(base):
    """Adapters a CPU minute at the lab recipe's steps and rows."""
    from training.w2w import people, population
    from training.w2w.config import RECIPES

    torch.set_num_threads(1)
    c, layers = RECIPES["lab"], linear_layers(base.model, RECIPES["lab"].layers, under="denoiser")
    own = people.people(c, base.model, range(60))
    t0 = time.thread_time()
    population.train(base.model, layers, own.shots, steps=10, rows=c.rows, lr=c.lr, theta0=start(layers))
    spent = (time.thread_time() - t0) * c.steps / 10
    print(f"\n{60 * 60 / spent:.0f} adapters of {c.steps} steps a CPU minute")


@pytest.mark.parametrize("n", [500, 1000])
def bench_components_of_a_large_population(n):
    """Streaming randomised SVD at d = 99,648, m = 20, rows made on the fly: seconds and peak memory, linear in N."""
    import resource

    torch.set_num_threads(1)
    d, k = 99_648, 24
    factor = torch.randn(k, d, generator=Generator().manual_seed(1))

    def blocks():
        for at in range(0, n, 250):
            g = Generator().manual_seed(at)
            yield torch.randn(250, k, generator=g) @ factor + torch.randn(250, d, generator=g)

    t0 = time.thread_time()
    made = subspace.fit(blocks, 20, route="randomised", oversample=20, power=1)
    spent = time.thread_time() - t0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{n} x {d}: {spent:.1f} CPU s, peak {peak:.2f} GiB, first 20 hold {float(made.share[-1]):.3f}")


def bench_a_row_that_says_nothing_costs_nothing(base):
    """Arms that no row names."""
    torch.set_num_threads(1)
    patch = make(base.model, m=64)
    g = Generator().manual_seed(0)
    x = {"sample": torch.randn(16, *base.model.shape, generator=g), "timestep": torch.full((16,), 500.0),
         "text": torch.randn(16, *base.model.conditions["text"], generator=g)}  # fmt: skip

    def run(on=None):
        with torch.inference_mode():
            for _ in range(10):
                base.model(**x)

    with apply(base.model, {"other": patch, "another": patch}) as on, on.rows([None] * 16):
        a = paired(run, run)[0]
    b = paired(run, run)[0]
    print(f"\nwith idle arms {1e3 * a:.1f} ms, without {1e3 * b:.1f} ms, ratio {a / b:.3f}")
    assert ONLY
