"""Batched pursuit is the textbook's and scikit-learn's."""

import pytest
import torch
import torch.nn.functional as nnf

from registry.errors import Invalid
from training.second_order.omp import atoms, pursue

G = torch.Generator().manual_seed(0)
TEXTS = torch.randn(300, 48, generator=G) + 2.0
SIGNALS = nnf.normalize(torch.randn(20, 48, generator=G), dim=1)


@pytest.mark.parametrize("norm", ["unit", "legacy"])
@pytest.mark.parametrize("m", [1, 5, 16])
def test_supports_and_coefficients_are_scikit_learns(norm, m):
    linear_model = pytest.importorskip("sklearn.linear_model")
    D = atoms(TEXTS.double(), norm)
    got = pursue(SIGNALS.double(), D, m)
    want = torch.from_numpy(linear_model.orthogonal_mp(D.T.numpy(), SIGNALS.double().T.numpy(), n_nonzero_coefs=m))
    dense = torch.zeros(300, len(SIGNALS)).double()
    dense[got.index.T, torch.arange(len(SIGNALS))] = got.coefficient.T
    torch.testing.assert_close(dense, want.reshape(300, -1), atol=1e-8, rtol=1e-8)


def test_float32_takes_the_same_atoms():
    D = atoms(TEXTS)
    one, two = pursue(SIGNALS, D, 12), pursue(SIGNALS.double(), D.double(), 12)
    assert torch.equal(one.index, two.index)


def test_residuals_fall_and_stand_on_what_was_taken():
    D = atoms(TEXTS)
    got = pursue(SIGNALS, D, 20)
    assert bool((got.explained.diff(dim=1) >= -1e-6).all())
    left = SIGNALS - got.sum(D)
    assert float(torch.einsum("smk,sk->sm", D[got.index], left).abs().max()) < 1e-5
    assert all(len(set(row)) == 20 for row in got.index.tolist())
    torch.testing.assert_close(1 - left.square().sum(1), got.explained[:, -1], atol=1e-5, rtol=0)


def test_a_planted_support_is_found_with_its_weights():
    D = nnf.normalize(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    where, how = torch.tensor([3, 77, 150]), torch.tensor([1.0, -0.7, 0.5])
    got = pursue((how @ D[where])[None], D, 3)
    assert dict(zip(got.index[0].tolist(), got.coefficient[0].tolist(), strict=True)) == pytest.approx(
        dict(zip(where.tolist(), how.tolist(), strict=True)), abs=1e-4
    )


def test_an_exhausted_signal_stops():
    D = torch.eye(8)
    got = pursue(torch.stack([3 * D[2], D[1] - 2 * D[5]]), D, 4)
    assert got.index.tolist() == [[2, -1, -1, -1], [5, 1, -1, -1]]
    torch.testing.assert_close(got.coefficient, torch.tensor([[3.0, 0, 0, 0], [-2.0, 1, 0, 0]]))
    assert not pursue(torch.zeros(2, 8), D, 2).coefficient.any()


def test_signals_do_not_see_each_other(monkeypatch):
    D = atoms(TEXTS)
    whole = pursue(SIGNALS, D, 6)
    monkeypatch.setattr("training.second_order.omp.CELLS", 3 * len(D))
    parts = pursue(SIGNALS, D, 6)
    assert torch.equal(whole.index, parts.index)
    torch.testing.assert_close(whole.coefficient, parts.coefficient)


def test_atoms_are_centred_and_of_the_norm_meant():
    torch.testing.assert_close(atoms(TEXTS).norm(dim=1), torch.ones(300))
    legacy = atoms(TEXTS, "legacy")
    torch.testing.assert_close(legacy.norm(dim=0), torch.full((48,), 100.0))
    torch.testing.assert_close(legacy.mean(0), torch.zeros(48), atol=1e-4, rtol=0)


@pytest.mark.parametrize("m", [0, 49, 1000])
def test_too_many_atoms_are_refused(m):
    with pytest.raises(Invalid, match=f"m={m}"):
        pursue(SIGNALS, atoms(TEXTS), m)


def test_one_text_is_no_dictionary():
    with pytest.raises(Invalid, match="two"):
        atoms(TEXTS[:1])
