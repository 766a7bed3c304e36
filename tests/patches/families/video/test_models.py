"""Both kinds of video model: by index is what transformers computes, and what is saved is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from patches.families.base import load_base
from patches.families.video import MaskedVideo, read, save, tiny, videomae
from patches.families.video.pixels import STILLS, bool_mask, normalise, patchify, split, unpatchify
from patches.families.video.tokens import END, PICTURES, RESERVED, VIDEO, Codebook, kmeans, sequence
from patches.families.video.track import propagate, to_frames
from registry.errors import BadArtifact, Invalid, NotFound, PatchError


def clips(model, n: int = 3, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, model.frames, 3, model.size, model.size), generator=g, dtype=torch.uint8)


def test_patches_come_back_and_masks_hide_as_many_in_every_clip() -> None:
    x = torch.rand(2, 4, 3, 16, 16)
    assert torch.equal(unpatchify(patchify(x, 2, 8), 4, 16, 2, 8), x)
    g = torch.Generator().manual_seed(0)
    for mask in ("tube", "random"):
        keep, hide = split(5, 4, 16, 0.75, g, mask)
        assert keep.shape == (5, 16)
        assert torch.equal(torch.cat([keep, hide], 1).sort(1).values, torch.arange(64).expand(5, -1))
        if mask == "tube":
            assert torch.equal(hide % 16, hide[:, :12].repeat(1, 4) % 16)


@pytest.mark.parametrize("normal", [False, True])
def test_the_loss_is_transformers_own(normal: bool) -> None:
    net = tiny().model.net
    net.config.norm_pix_loss = normal
    x = normalise(clips(tiny().model), still="mean")
    keep, hide = split(3, 2, 4, 0.5, torch.Generator().manual_seed(1), "random")
    ours = videomae.loss(net, patchify(x, 2, 8), keep, hide)
    assert float(ours.detach()) == pytest.approx(
        float(net(x, bool_masked_pos=bool_mask(hide, 8)).loss.detach()), rel=1e-5
    )


def test_states_and_scores_are_transformers_own() -> None:
    torch.manual_seed(0)
    config = VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=2,
                            num_attention_heads=2, intermediate_size=32, num_labels=5)  # fmt: skip
    net = VideoMAEForVideoClassification(config).eval()
    model = MaskedVideo(net, [str(i) for i in range(5)], still="keep")
    video = clips(model)
    theirs = net(normalise(video), output_hidden_states=True)
    out = model(clips=video)
    torch.testing.assert_close(out["scores"], theirs.logits)
    for ours, other in zip(out["states"], theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours, other)
    assert model.head == "classifier"
    with pytest.raises(PatchError, match="decoder was left behind"):
        model.reconstruct(video)


def test_what_is_taken_away_leaves_nothing_of_a_still_clip_and_no_future_where_it_must_not() -> None:
    still = clips(tiny().model, 1)[:, :1].expand(-1, 4, -1, -1, -1)
    for way in STILLS[1:]:
        assert float(normalise(still, still=way).abs().max()) < 1e-5
    video = clips(tiny().model, 1)
    other = video.clone()
    other[:, 3] = 255 - other[:, 3]
    for way in ("first", "previous", "keep"):
        assert torch.equal(normalise(video, still=way)[:, :3], normalise(other, still=way)[:, :3])
    assert not torch.equal(normalise(video, still="mean")[:, :3], normalise(other, still="mean")[:, :3])


def test_a_reconstruction_keeps_what_was_seen() -> None:
    model = tiny().model
    video = clips(model)
    made, hidden, error = model.reconstruct(video, 0.5, "tube", 3)
    kept = ~hidden[:, :, None].expand_as(made)
    torch.testing.assert_close(made[kept], (video.float() / 255)[kept])
    assert hidden.float().mean() == 0.5
    assert bool((hidden == hidden[:, :1]).all())  # a tube is the same in every frame
    assert error.shape == (3,)


def test_tokens_are_marked_as_the_paper_marks_them() -> None:
    ids = sequence(torch.zeros(2, 4, 4, dtype=torch.int64))
    assert ids.shape == (2, 18)
    assert ids[0, 0] == VIDEO == 1
    assert ids[0, -1] == END == 2
    assert sequence(torch.zeros(1, 4, 4, dtype=torch.int64), "pictures")[0, 0] == PICTURES == 3
    assert int(ids[0, 1]) == RESERVED


def test_a_codebook_shows_what_it_encodes() -> None:
    torch.manual_seed(0)
    video = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    for residual in (False, True):
        shape = Codebook(torch.zeros(1, 48), 4, 1, residual)
        exact = Codebook(shape.patches(video).flatten(0, 2), 4, 1, residual)
        shown = exact.decode(exact.encode(video), 16)
        torch.testing.assert_close(shown, video.float() / 255, atol=1e-5, rtol=0)


def test_kmeans_finds_planted_centres() -> None:
    g = torch.Generator().manual_seed(0)
    true = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = (true[:, None] + 0.1 * torch.randn(3, 50, 2, generator=g)).flatten(0, 1)
    found = kmeans(x, 3, g)
    assert float(torch.cdist(true, found).min(1).values.max()) < 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cached_rollout_is_the_naive_one(temperature: float) -> None:
    model = tiny(0, "toto").model
    video = clips(model, 2)
    with torch.inference_mode():
        a, b = (model.rollout(video, 2, temperature, 5, 7, cached=c) for c in (True, False))
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(Invalid, match="from 1 to 3"):
        model.rollout(video, 4)


def test_surprise_knows_nothing_of_the_future() -> None:
    model = tiny(0, "toto").model
    video = clips(model, 1)
    other = video.clone()
    other[:, 3] = 255 - other[:, 3]
    with torch.inference_mode():
        a, b = model.surprise(video), model.surprise(other)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3], b[:, 3])


def test_labels_follow_a_thing_that_moves() -> None:
    side, slices = 4, 4
    features = torch.zeros(slices, side * side, 3)
    features[..., 0] = 1.0
    for s in range(slices):
        features[s, 4 + s] = torch.tensor([0.0, 1.0, 0.0])
    mask = torch.zeros(16, 16, dtype=torch.int64)
    mask[4:8, :4] = 1
    found = propagate(features, mask, side)
    for s in range(slices):
        assert bool((found[s, 4:8, 4 * s : 4 * s + 4] == 1).float().mean() > 0.6)
    assert to_frames(found, 8).shape == (8, 16, 16)
    assert torch.equal(to_frames(found, 8)[1], found[0])


@pytest.mark.parametrize("kind", ["videomae", "toto"])
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    model = tiny(3, kind).model
    save(model, tmp_path)
    base = load_base(f"local-dir:{tmp_path}", "video")
    video = clips(model)
    with torch.inference_mode():
        a, b = model(clips=video), base.model(clips=video)
    assert torch.equal(a["scores"], b["scores"])
    assert base.model.classes == model.classes
    half = tmp_path / "half"
    save(model, half, torch.float16)
    with torch.inference_mode():
        c = read(half).eval()(clips=video)
    torch.testing.assert_close(a["states"][-1], c["states"][-1], atol=2e-2, rtol=2e-2)


def test_a_fine_tuned_copy_lies_beside_the_pre_trained_model(tmp_path: Path) -> None:
    base = tiny().model
    torch.manual_seed(2)
    config = VideoMAEConfig(**{**base.net.config.to_dict(), "use_mean_pooling": True, "num_labels": 3})
    tuned = VideoMAEForVideoClassification(config).eval()
    model = MaskedVideo(base.net, base.classes, base.probe, 2, tuned, "mean").eval()
    save(model, tmp_path)
    again = read(tmp_path).eval()
    video = clips(model)
    with torch.inference_mode():
        assert torch.equal(model(clips=video)["scores"], again(clips=video)["scores"])
    assert again.head == "classifier"
    assert again.decodes


def test_weights_of_older_releases_are_read(tmp_path: Path) -> None:
    model = tiny().model
    save(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file({k.replace("query.bias", "q_bias").replace("value.bias", "v_bias") if "encoder.layer" in k else k: v
               for k, v in held.items()}, tmp_path / "model.safetensors")  # fmt: skip
    video = clips(model)
    with torch.inference_mode():
        assert torch.equal(read(tmp_path).eval()(clips=video)["scores"], model(clips=video)["scores"])


def test_broken_folders_are_refused_with_the_file(tmp_path: Path) -> None:
    save(tiny().model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"still": "sometimes"}))
    with pytest.raises(BadArtifact, match="still='sometimes'"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BadArtifact, match="model_type='bert'"):
        read(tmp_path)
    save(tiny(0, "toto").model, tmp_path / "b")
    (tmp_path / "b" / "codebook.safetensors").unlink()
    with pytest.raises(BadArtifact, match="without a tokenizer"):
        read(tmp_path / "b")
    with pytest.raises(NotFound, match="lab:video-"):
        load_base("lab:video-nobody", "video")
    with pytest.raises(NotFound, match="names no video model"):
        load_base("somewhere", "video")
