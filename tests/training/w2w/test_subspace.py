"""Components: two routes to the same space as a full SVD, in blocks; directions and probes on a planted truth."""

import pytest
import torch
from torch import Generator

from registry.errors import ConfigError
from training.w2w import directions, simulate, subspace


def population(n=80, d=400, k=6, noise=0.02, seed=0):
    """n models of d numbers of very different sizes, k of whose directions hold nearly everything."""
    g = Generator().manual_seed(seed)
    strength = torch.tensor([8.0, 6.0, 4.5, 3.0, 2.0, 1.4])[:k]
    x = (torch.randn(n, k, generator=g) * strength) @ torch.linalg.qr(torch.randn(d, k, generator=g)).Q.T
    x = x + noise * torch.randn(n, d, generator=g)
    return x * torch.logspace(-2, 1, d) + torch.randn(d, generator=g)


def exact(x, m):
    z = (x - x.mean(0)) / x.std(0)
    _, s, v = torch.linalg.svd(z.double(), full_matrices=False)
    return (s[:m] / (len(x) - 1) ** 0.5).float(), v[:m].T.float(), (s.square().cumsum(0) / s.square().sum())[:m]


@pytest.mark.parametrize("route", ["gram", "randomised"])
@pytest.mark.parametrize("block", [7, 80])
def test_both_routes_are_the_full_svd_to_1e_4(route, block):
    x = population()
    got = subspace.fit(lambda: iter(x.split(block)), 5, route=route, power=3)
    std, basis, share = exact(x, 5)
    torch.testing.assert_close(got.mean, x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sd, x.std(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.std, std, atol=1e-4, rtol=1e-4)
    assert float(((got.basis * basis).sum(0).abs() - 1).abs().max()) < 1e-4
    torch.testing.assert_close(got.share, share.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.basis.T @ got.basis, torch.eye(5), atol=1e-4, rtol=0)


def test_a_population_drawn_on_the_fly_gives_its_planted_directions_as_all_of_it_in_memory_does():
    c = simulate.Simulation(models=300, numbers=1001, components=20, planted=6, block=70, power=2)
    got = simulate.simulate(c)
    assert (got["models"], got["passes"]) == (300, 1 + 2 + 2 * c.power)
    assert got["found"] > 0.9
    directions = simulate.planted(c)
    x = torch.cat(list(simulate.rows(c, directions)))
    assert torch.equal(x, torch.cat(list(simulate.rows(c, directions))))
    assert abs(float(x.std()) - (1 + float(directions.square().sum()) / c.numbers) ** 0.5) < 0.02
    exactly = subspace.fit(lambda: iter([x]), 6, route="gram")
    ours = subspace.fit(lambda: simulate.rows(c, directions), 6, route="randomised", power=4)
    assert float((exactly.basis.T @ ours.basis).det().abs()) > 0.999
    assert abs(float(exactly.share[-1]) - float(ours.share[-1])) < 1e-4


def test_coefficients_are_in_standard_deviations_of_the_population():
    x = population()
    got = subspace.fit(lambda: iter(x.split(30)), 4)
    z = got.encode(x)
    torch.testing.assert_close(z.std(0), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-4, rtol=0)


def test_a_number_that_all_models_share_is_no_component():
    x = population()
    x[:, 3] = 0.125
    got = subspace.fit(lambda: iter(x.split(30)), 4)
    assert float(got.basis[3].abs().max()) == 0.0
    assert bool(got.std.isfinite().all())


def test_what_is_no_population_is_refused():
    x = population(n=5)
    with pytest.raises(ConfigError, match="at most 4"):
        subspace.fit(lambda: iter([x]), 5)
    for n in (1, 2):
        with pytest.raises(ConfigError, match=f"population of {n}"):
            subspace.fit(lambda n=n: iter([x[:n]]), 1)
    with pytest.raises(ConfigError, match="route"):
        subspace.fit(lambda: iter([x]), 2, route="magic")
    flat = torch.ones(6, 1) @ torch.randn(1, 10) + torch.arange(6.0)[:, None] @ torch.randn(1, 10)
    with pytest.raises(ConfigError, match="ask for fewer"):
        subspace.fit(lambda: iter([flat]), 4)


def test_directions_move_what_they_are_called_after_and_gaps_are_the_unit():
    g = Generator().manual_seed(0)
    labels = (torch.rand(300, 3, generator=g) < torch.tensor([0.5, 0.3, 0.6])).float()
    z = torch.randn(300, 12, generator=g) * 0.4
    z[:, 0] += 2 * labels[:, 0]
    z[:, 1] += 1.5 * labels[:, 1] + 0.7 * labels[:, 0]
    z[:, 2] += labels[:, 2]
    z = (z - z.mean(0)) / z.std(0)
    for method in directions.METHODS:
        d, gap, reach = directions.directions(z, labels, torch.linspace(3, 1, 12), method)
        torch.testing.assert_close(d.norm(dim=1), torch.ones(3))
        for i in range(3):
            along = z @ d[i]
            there = float(along[labels[:, i] > 0.5].mean() - along[labels[:, i] <= 0.5].mean())
            assert abs(there - float(gap[i])) < 1e-4
            assert float(reach[i, 0]) <= float(along.mean()) <= float(reach[i, 1])
            assert directions.auc(along, labels[:, i] > 0.5) > 0.75
    partial = directions.directions(z, labels, torch.ones(12), "partial")[0]
    sparse = directions.directions(z, labels, torch.ones(12), "sparse")[0]
    # what only the second attribute moves: the first one's share of coordinate 1 is not its own effect
    assert float(partial[1, 1]) > 0.9
    for ours, whole in zip(sparse, partial, strict=True):
        kept = ours != 0
        assert 1 <= int(kept.sum()) < 12
        torch.testing.assert_close(ours[kept] / whole[kept], (ours[kept] / whole[kept])[:1].expand(int(kept.sum())))
    d, _, _ = directions.directions(z, labels, torch.ones(12), "orthogonal")
    mean, _, _ = directions.directions(z, labels, torch.ones(12), "mean")
    off = (d @ mean.T - torch.diag((d * mean).sum(1))).abs().max()
    assert float(off) < 1e-4
    with pytest.raises(ConfigError, match="two of each"):
        directions.directions(z, torch.ones(300, 1), torch.ones(12), "mean", ["beard"])


def test_a_probe_reads_what_is_there_and_nothing_from_shuffled_labels():
    g = Generator().manual_seed(0)
    labels = (torch.rand(260, 2, generator=g) < 0.5).float()
    z = torch.randn(260, 10, generator=g)
    z[:, :2] += 2.5 * labels
    auc, _ = directions.probe_auc(z[:200], labels[:200], z[200:], labels[200:], [0, 1], draws=50)
    assert auc.value > 0.9
    assert auc.low < auc.value < auc.high
    assert auc.n == 60
    assert abs(directions.shuffled_auc(z[:200], labels[:200], z[200:], labels[200:], [0, 1]) - 0.5) < 0.12


def test_a_warm_start_predicts_coefficients_better_than_the_mean_does():
    g = Generator().manual_seed(0)
    z = torch.randn(200, 4, generator=g)
    latents = z @ torch.randn(4, 20, generator=g) + 0.5 * torch.randn(200, 20, generator=g) + 3.0
    w = directions.warm_start(latents[:150], z[:150])
    guess = latents[150:] @ w[:-1] + w[-1]
    assert float((guess - z[150:]).square().mean()) < 0.3 * float(z[150:].square().mean())
