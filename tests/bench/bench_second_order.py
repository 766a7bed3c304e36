"""What the second-order lens costs; every ratio from one interleaved run."""

import pytest
import torch
import torch.nn.functional as nnf

from patches.bases import load_base
from patches.second_order import Moments, lens, look, scalars
from training.omp import pursue

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


def bench_pursuit(benchmark):
    """128 signals (ViT-B/32 has 3,072 a layer), 10,000 texts of 512 dimensions, 64 each: ours over scikit-learn's."""
    from sklearn.decomposition import SparseCoder

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    D = nnf.normalize(torch.randn(10_000, 512, generator=g), dim=1)
    x = nnf.normalize(torch.randn(128, 512, generator=g), dim=1)
    coder = SparseCoder(D.numpy(), transform_algorithm="omp", transform_n_nonzero_coefs=64)
    made: dict[str, torch.Tensor] = {}

    def ours():
        made["ours"] = pursue(x, D, 64).index

    def theirs():
        made["scikit-learn"] = torch.from_numpy(coder.transform(x.numpy())) != 0

    variants = {"ours": ours, "scikit-learn": theirs}
    times = interleave(variants, 2, warmup=0)
    found = made["scikit-learn"]
    same = torch.zeros_like(found).scatter_(1, made["ours"], True) == found
    # float32 on both sides: where two texts are within rounding of each other, either may come first
    assert float(same.all(1).float().mean()) > 0.95
    got = ratio(times["scikit-learn"], times["ours"])
    benchmark.pedantic(variants["ours"], rounds=1)
    benchmark.extra_info.update(ratios={"ours": {"median": 1 / got.median}}, speedup=vars(got))
    print(f"\npursuit: {got.median:.1f} [{got.low:.1f}, {got.high:.1f}] times scikit-learn's speed")
    assert got.median >= 10


@torch.inference_mode()
def bench_lens(benchmark):
    """Second-order effects of all neurons of a layer of lab:clip over the forward alone, 32 pictures."""
    torch.set_num_threads(1)
    base, layer = load_base("lab:clip", "clip"), 5
    x, at = torch.randn(32, 3, 96, 96), lens(base, layer)
    moments = Moments(at)
    variants = {
        "forward": lambda: base.model(image=x),
        "scalars": lambda: scalars(look(base, x, [layer]), layer),
        "moments": lambda: moments.add(scalars(look(base, x, [layer]), layer)),
    }
    times = interleave(variants, 8, warmup=2)
    out = {k: ratio(t, times["forward"]) for k, t in times.items() if k != "forward"}
    benchmark.pedantic(variants["scalars"], rounds=1)
    benchmark.extra_info.update(ratios={k: vars(v) for k, v in out.items()})
    print(f"\nlens, forward = 1: { {k: f'{v.median:.2f} [{v.low:.2f}, {v.high:.2f}]' for k, v in out.items()} }")
