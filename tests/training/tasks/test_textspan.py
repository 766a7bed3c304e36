"""TEXTSPAN from second moments: the same as the algorithm on the contributions, whatever the number of pictures."""

import pytest
import torch

from patches.families.clip.direct import Lens
from registry.errors import Invalid, NotFound
from training.tasks.textspan import HeadMoments, basis, moments, read_pool, spans


def images(n=20, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def of(C):
    """HeadMoments of one head's contributions (N, k)."""
    C = C.double()
    return HeadMoments(len(C), C.sum(0)[None, None], (C.T @ C)[None, None], (0,))


def plainly(C, R, count, rank=80):
    """The algorithm as published, on the contributions themselves."""
    C, R = C.double(), R.double()
    _, S, Vh = torch.linalg.svd(C, full_matrices=False)
    B = Vh[: min(rank, int((1e-6 * S[0] < S).sum()))]
    R = R @ B.T @ B
    C = C - C.mean(0)
    total, out, share = C.square().sum(), [], []
    for _ in range(count):
        P = C @ R.T
        j = int(P.var(0).argmax())
        out.append(j)
        u = R[j] / R[j].norm()
        share.append(float((C @ u).square().sum() / total))
        C = C - torch.outer(C @ u, u)
        R = R - torch.outer(R @ u, u)
    return out, share


@pytest.mark.parametrize("rank", [80, 12])
def test_moments_pick_what_the_contributions_pick(rank):
    g = torch.Generator().manual_seed(1)
    C = torch.randn(300, 40, generator=g) * torch.linspace(2, 0.1, 40) + torch.randn(40, generator=g)
    R = torch.nn.functional.normalize(torch.randn(500, 40, generator=g), dim=1)
    (got,) = spans(of(C), R, 10, rank)
    texts, share = plainly(C, R, 10, rank)
    assert list(got.texts) == texts
    assert list(got.share) == pytest.approx(share, rel=1e-6)
    assert got.variance == pytest.approx(float(C.double().var(0, correction=0).sum()))


def test_planted_directions_are_found_in_their_order():
    g = torch.Generator().manual_seed(2)
    R = torch.linalg.qr(torch.randn(24, 24, generator=g))[0]
    weight = torch.randn(400, 3, generator=g) * torch.tensor([3.0, 2.0, 1.0])
    C = weight @ R[[7, 3, 11]] + 5 * R[20]  # and a constant that says nothing of pictures
    (got,) = spans(of(C), R, 6)
    assert got.texts[:3] == (7, 3, 11)
    assert sum(got.share[:3]) == pytest.approx(1.0, abs=1e-6)
    assert got.rank == 4
    assert len(got.texts) <= 4  # what is left is rounding, and is not named


def test_a_head_that_says_nothing_of_pictures_gets_no_text():
    R = torch.nn.functional.normalize(torch.randn(9, 6), dim=1)
    (got,) = spans(of(torch.ones(5, 6)), R, 3)
    assert got.texts == ()
    (got,) = spans(of(torch.zeros(5, 6)), R, 3)
    assert got.texts == ()


def test_streaming_in_batches_gives_the_same_moments(tiny_clip):
    lens, x = Lens(tiny_clip), images()
    whole, parts = moments(lens, [x], [0, 2]), moments(lens, x.split(3), [0, 2])
    torch.testing.assert_close(whole.square, parts.square, atol=1e-7, rtol=1e-5)
    read = lens.read(x)
    c = (read.heads / read.norm[:, None, None, None]).double()[:, [0, 2]]
    torch.testing.assert_close(whole.sum, c.sum(0))
    centred = c - c.mean(0)
    want = torch.einsum("bk,bm->km", centred[:, 1, 3], centred[:, 1, 3]) / len(c)
    torch.testing.assert_close(whole.covariance(1, 3), want, atol=1e-9, rtol=1e-5)


def test_a_head_has_no_more_directions_than_columns(tiny_clip):
    seen = moments(Lens(tiny_clip), [images(60)], [1])
    assert {len(basis(seen.square[0, h], 80)) for h in range(4)} == {8}


def test_pictures_in_another_order_change_nothing(tiny_clip):
    lens, x = Lens(tiny_clip), images()
    R = torch.nn.functional.normalize(torch.randn(50, 24, generator=torch.Generator().manual_seed(3)), dim=1)
    one, two = (spans(moments(lens, [p], [0, 1, 2]), R, 4) for p in (x, x.flip(0)))
    assert [s.texts for s in one] == [s.texts for s in two]


def test_normalised_pools_let_short_texts_win():
    C = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.01, 0.01])
    R = torch.tensor([[0.1, 0.0, 0.0, 0.99], [0.0, 1.0, 0.0, 0.0]])
    C[:, 3] = 0
    assert spans(of(C), R, 1)[0].texts == (1,)
    assert spans(of(C), R, 1, normalise_pool=True)[0].texts == (0,)


def test_pools_are_read_line_by_line(tmp_path):
    file = tmp_path / "pool.txt"
    file.write_text("a cat\n\n  a dog \na cat\n")
    assert read_pool(file) == ("a cat", "a dog")
    file.write_text("one\n")
    with pytest.raises(Invalid, match="1 different"):
        read_pool(file)
    file.write_bytes(b"\xff\xfe\n\xff")
    with pytest.raises(Invalid, match="UTF-8"):
        read_pool(file)
    with pytest.raises(NotFound, match=r"\.txt"):
        read_pool(tmp_path / "pool.json")


def test_too_little_is_told(tiny_clip):
    with pytest.raises(Invalid, match="two pictures"):
        moments(Lens(tiny_clip), [images(1)], [0])
    with pytest.raises(Invalid, match="pool of 3"):
        spans(of(torch.randn(5, 4)), torch.randn(3, 4), 4)
