"""Pictures of any arms in one batch: each gets the answer its own arm gives alone."""

import pytest
import torch

from patches.engine.patch import apply
from patches.families import clip
from patches.families.clip.towers import PARITY, prepared
from patches.families.clip.worker import Embedder, Picture
from patches.mechanisms.features import SAE, edit
from registry.errors import Invalid, NotReady


def some_edit(seed):
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(20, 32, generator=g), dim=1)
    return edit(SAE(W, torch.zeros(20), W, torch.zeros(32)), clip.site("block", 1), range(0, 20, 2))


ARMS = {"a": some_edit(0), "b": some_edit(1)}


def pixels(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def alone(base, x, patch):
    if patch is None:
        return clip.embed_images(base, x)
    with patch.apply(base.model, root=base.root):
        return clip.embed_images(base, x)


def test_every_picture_gets_its_own_arms_answer(tiny_clip):
    x, arms = pixels(9), [None, "a", "b"] * 3
    want = {arm: alone(tiny_clip, x, ARMS.get(arm)) for arm in (None, "a", "b")}
    with apply(tiny_clip.model, ARMS, root=tiny_clip.root) as on:
        worker = Embedder(tiny_clip, on, slots=4)  # three batches
        done = worker.run([Picture(v, arm=arm) for v, arm in zip(x, arms, strict=True)])
    for i, (p, arm) in enumerate(zip(done, arms, strict=True)):
        torch.testing.assert_close(p.out, want[arm][i], atol=1e-5, rtol=0)
        assert p.finished == "stop"
    assert (want["a"] - want[None]).abs().max() > 1e-3


def test_strength_nought_is_the_base_bit_for_bit(tiny_clip):
    x = pixels(2)
    with apply(tiny_clip.model, ARMS, root=tiny_clip.root) as on:
        worker = Embedder(tiny_clip, on)
        off, base = (worker.run([Picture(v, arm=arm, strength=s) for v in x]) for arm, s in (("a", 0.0), (None, 1.0)))
        assert all(torch.equal(p.out, q.out) for p, q in zip(off, base, strict=True))
        assert torch.equal(worker.proof("b", 0.0), worker.proof(None))
        assert not torch.equal(worker.proof("b"), worker.proof(None))


def test_what_does_not_fit_is_refused_and_nothing_is_queued(tiny_clip):
    with apply(tiny_clip.model, ARMS, root=tiny_clip.root) as on:
        worker = Embedder(tiny_clip, on)
        for bad in (torch.zeros(3, 16, 16), torch.full((3, 32, 32), float("nan"))):
            with pytest.raises(Invalid, match="Pixels"):
                worker.add([Picture(pixels(1)[0]), Picture(bad)])
        assert worker.idle


def test_a_cancelled_picture_is_not_embedded(tiny_clip):
    with apply(tiny_clip.model, ARMS, root=tiny_clip.root) as on:
        worker, (p, q) = Embedder(tiny_clip, on), (Picture(v) for v in pixels(2))
        worker.add([p, q])
        worker.cancel(p)
        assert worker.step() == [q]
        assert (p.finished, p.out) == ("cancelled", None)


def test_onnx_towers_answer_as_torch_does_for_every_arm(tiny_clip, home):
    """Full strength through ONNX Runtime, anything between through torch; all within its parity."""
    x = pixels(4)
    want = {arm: alone(tiny_clip, x, ARMS.get(arm)) for arm in (None, "a")}

    def engine(arm, patch):
        return prepared(clip.tiny(), "cpu", patch, system="clip_sae", digest="a" * 64 if arm else "")

    with apply(tiny_clip.model, {}, root=tiny_clip.root) as on:
        worker = Embedder(tiny_clip, on, engines=engine)
        on.add("a", ARMS["a"])
        worker.prepare("a", ARMS["a"])
        done = worker.run(
            [*(Picture(v) for v in x), *(Picture(v, arm="a") for v in x), Picture(x[0], arm="a", strength=0.5)]
        )
        for i in range(4):
            torch.testing.assert_close(done[i].out, want[None][i], atol=PARITY, rtol=0)
            torch.testing.assert_close(done[4 + i].out, want["a"][i], atol=PARITY, rtol=0)
        half = done[8].out
        assert (half - want[None][0]).abs().max() > 1e-3
        assert (half - want["a"][0]).abs().max() > 1e-3
        again = engine("a", ARMS["a"])  # kept: read back, not written again
        torch.testing.assert_close(again("image", x), want["a"], atol=PARITY, rtol=0)
    with pytest.raises(NotReady, match="no provider"):
        prepared(clip.tiny(), "tpu")
