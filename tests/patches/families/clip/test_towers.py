"""CLIP's towers in ONNX Runtime."""

from dataclasses import dataclass

import onnx
import pytest
import torch

from patches.engine.edits import Act
from patches.engine.patch import Patch
from patches.families import clip
from patches.families.clip.towers import PARITY, Towers, _check_parity, _probe, _Tower, export_towers
from patches.mechanisms.features import SAE, edit
from registry import manifest
from registry.errors import NotReady, PatchError

IMAGES = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class NoConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Erase(Patch):
    """Project a direction out of every token of a block."""

    Config = NoConfig

    def edits(self):
        d = self.tensors["d"]
        return [Act(clip.site("block", 0), lambda x, _: x - (x @ d)[..., None] * d)]


@pytest.fixture(scope="module")
def base():
    return clip.tiny(layers=2)


@pytest.fixture(scope="module", params=["erase", "topk", "jumprelu"])
def patch(request):
    g = torch.Generator().manual_seed(2)
    if request.param == "erase":
        d = torch.randn(32, generator=g)
        return Erase(NoConfig(), {"d": d / d.norm()})
    F = 64
    W = torch.randn(F, 32, generator=g)
    threshold = torch.full((F,), 2.0) if request.param == "jumprelu" else None
    k = 8 if request.param == "topk" else 0
    sae = SAE(W, torch.zeros(F), W / W.norm(dim=1, keepdim=True), torch.zeros(32), request.param, k, threshold)
    return edit(sae, clip.site("block", 0), range(20))


@pytest.fixture(scope="module")
def patched(base, patch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export_towers(base, folder, patch, system="clip_sae", parents=["0" * 64])
    return folder


def test_the_towers_answer_as_the_patched_model_does_at_any_batch(base, patch, patched):
    towers, texts = Towers(patched), ["a", "bb", "c"]
    for count in (1, 7):
        with patch.apply(base.model):
            want = clip.embed_images(base, IMAGES[:count])
        got = towers("image", base.processor.image(IMAGES[:count]))
        torch.testing.assert_close(got, want, atol=PARITY, rtol=0)
        assert (got - clip.embed_images(base, IMAGES[:count])).abs().max() > 100 * PARITY
    got = towers("text", base.processor.text(texts))
    torch.testing.assert_close(got, clip.embed_texts(base, texts), atol=PARITY, rtol=0)


def test_the_folder_is_sealed_and_says_nothing_of_this_machine(base, patched):
    about = manifest.read(patched, base=base.digest)
    assert (about.kind, about.system, about.parents) == ("model", "clip_sae", ["0" * 64])
    assert set(about.files) == {"image.onnx", "text.onnx"}
    for name in about.files:
        onnx.checker.check_model(onnx.load(patched / name))
        assert b"site-packages" not in (patched / name).read_bytes()


def test_the_base_is_left_without_hooks(base, patched):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_graphs_that_answer_differently_are_refused(base, patched):
    """The folder holds the patched tower; held against the base it must not pass."""
    with pytest.raises(PatchError, match="image embeddings differ.*Serve with torch"):
        _check_parity(patched, base)


def test_graphs_that_do_not_run_at_another_batch_are_refused(base, tmp_path):
    for name in ("image", "text"):
        tower = _Tower(base.model, name).eval()
        torch.onnx.export(
            tower, (_probe(base, name, 2),), tmp_path / f"{name}.onnx", input_names=["x"], dynamo=True, verbose=False
        )
    with pytest.raises(PatchError, match="cannot run the traced image tower.*Serve with torch"):
        _check_parity(tmp_path, base)


def test_a_missing_provider_is_not_replaced_without_a_word(patched):
    with pytest.raises(NotReady, match="no provider 'tpu'"):
        Towers(patched, provider="tpu")
