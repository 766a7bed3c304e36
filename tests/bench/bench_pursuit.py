"""What naming neurons by texts costs; the ratio from one interleaved run."""

import pytest
import torch
import torch.nn.functional as nnf

from training.second_order.omp import pursue

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
