from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf

from patches.families import clip
from training.clip_sae.defences import (
    STAR,
    Pairs,
    Prefix,
    PrefixConfig,
    Projection,
    ProjectionConfig,
    Score,
    accuracies,
    dyslexify,
    interpolation,
    looks_at_text,
    pairs,
    prefix,
    projection,
    score,
    silence,
)
from training.lab import worlds
from training.tasks.recognition import Arm

NAMES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen")


def embeddings_only(label, word, clean, attacked, classes=NAMES):
    """Pairs for what is fitted on embeddings: there are no pictures."""
    none = torch.zeros(len(label), 0)
    y = nnf.normalize(clean, dim=1), nnf.normalize(attacked, dim=1)
    return Pairs(none, none, y, none.bool(), label, word, classes)


def state(base):
    return {k: v.clone() for k, v in base.model.state_dict().items()}


def test_nothing_below_the_floor_is_chosen():
    good, better, costly, ruinous = Score(0.95, 0.3), Score(0.95, 0.4), Score(0.9, 0.9), Score(0.2, 0.95)
    order = sorted((good, better, costly, ruinous), key=lambda s: -s.worth(0.95))
    assert order == [better, good, costly, ruinous]


def test_pairs_are_the_same_pictures_and_know_where_the_writing_is(tiny_clip):
    clean, attacked = (worlds.typographic("train", 12, word=w) for w in ("none", "wrong"))
    p = pairs(tiny_clip, clean, attacked)
    differs = (p.clean != p.attacked).any(1).float()
    beside = nnf.adaptive_max_pool2d(differs, tuple(tiny_clip.model.visual.grid_size)).flatten(1).bool()
    assert not (p.text & ~beside).any()
    assert p.text.any(1).all()
    assert (p.word != p.label).all()
    torch.testing.assert_close(p.y[1], clip.embed_images(tiny_clip, p.attacked))


READER = (0, 2)


@pytest.fixture(scope="module")
def reading():
    """A tiny CLIP one of whose heads looks at white patches and writes at the class token that it saw some; and pairs
    of pictures without and with a white strip, whose labels are what the model says without strip and head."""
    base = clip.tiny(seed=2)  # what it says of noise is diverse
    base.model.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    clean = 0.3 * torch.randn(40, 3, 32, 32, generator=g)
    attacked, text = clean.clone(), torch.zeros(40, 4, 4, dtype=torch.bool)
    attacked[:, :, 16:24, 8:] = 1.5
    text[:, 2, 1:] = True

    block, (_, head) = base.model.visual.transformer.resblocks[0], READER
    seen = []
    handle = block.ln_1.register_forward_hook(lambda _, __, out: seen.append(out))
    clip.embed_images(base, attacked)
    handle.remove()
    cls, x, on = seen[0][:, 0], seen[0][:, 1:], text.flatten(1)
    way = x[on].mean(0) - x[~on].mean(0)
    e = block.attn.in_proj_weight.shape[0] // 3 // block.attn.heads
    q, k, v = (slice(part * 32 + head * e, part * 32 + (head + 1) * e) for part in range(3))
    for rows in (q, k, v):
        block.attn.in_proj_weight[rows], block.attn.in_proj_bias[rows] = 0, 0
    apart = (cls.mean(0) - x.mean((0, 1))) / (cls.mean(0) - x.mean((0, 1))).square().sum()
    block.attn.in_proj_weight[q.start] = 2 * apart  # 1 at the class token, -1 at patches, which look elsewhere
    block.attn.in_proj_bias[q.start] = -apart @ (cls.mean(0) + x.mean((0, 1)))
    block.attn.in_proj_weight[k.start] = 12 * e**0.5 * way / way.square().sum()
    block.attn.in_proj_weight[v.start] = 10 * way / way.square().sum()
    block.attn.in_proj_bias[v.start] = -10 * (x[~on].mean(0) @ way) / way.square().sum()

    with silence([READER], 4).apply(base.model):
        said = (clip.embed_images(base, clean) @ clip.zero_shot(base, NAMES)).argmax(1)
    y = clip.embed_images(base, clean), clip.embed_images(base, attacked)
    return base, Pairs(clean, attacked, y, on, said, (said + 1) % len(NAMES), NAMES)


def test_the_head_that_looks_at_letters_has_the_highest_score(reading):
    base, p = reading
    looks = looks_at_text(base, p)
    assert looks.shape == (3, 4)
    assert divmod(int(looks.argmax()), 4) == READER
    assert looks[READER] > 0.9
    assert looks.min() >= 0
    assert looks.max() <= 1


def test_the_head_that_reads_is_silenced_and_the_pictures_are_right_again(reading):
    base, p = reading
    before = accuracies(base, p, None)
    d = dyslexify(base, p, p, floor=before.clean - 0.05, drop=0.05)
    assert READER in d.about["heads"]
    assert accuracies(base, p, d).attacked >= before.attacked + 0.3


def test_silence_is_at_the_class_token_alone(tiny_clip):
    d = silence([(1, 0), (1, 3)], 4)
    x = torch.ones(2, 17, 32)
    out = d.edits()[0].fn(x, None)
    want = x.clone()
    want[:, 0, :8] = want[:, 0, 24:] = 0
    assert torch.equal(out, want)


def test_a_prefix_changes_texts_with_its_token_alone(tiny_clip):
    token = int(tiny_clip.processor.text([STAR])[0, 1])
    patch = Prefix(PrefixConfig(token), {"vector": torch.full((32,), 0.5)})
    plain = clip.embed_texts(tiny_clip, ["a dog", f"a {STAR} dog"])
    with patch.apply(tiny_clip.model):
        defended = clip.embed_texts(tiny_clip, ["a dog", f"a {STAR} dog"])
    assert torch.equal(plain[0], defended[0])
    assert not torch.allclose(plain[1], defended[1])


def test_a_prefix_is_learned_that_names_what_attacked_pictures_look_like(tiny_clip):
    """Attacked pictures are where class names stand behind a secret token: it is found well enough to name them."""
    tiny_clip.model.requires_grad_(False)
    token = int(tiny_clip.processor.text([STAR])[0, 1])
    secret = Prefix(PrefixConfig(token), {"vector": 2 * torch.randn(32, generator=torch.Generator().manual_seed(5))})
    with secret.apply(tiny_clip.model):
        hidden = clip.zero_shot(tiny_clip, NAMES, [t.replace("{}", f"{STAR} {{}}") for t in clip.TEMPLATES]).T
    label = torch.arange(64) % len(NAMES)
    p = embeddings_only(label, (label + 3) % len(NAMES), clip.zero_shot(tiny_clip, NAMES).T[label], hidden[label])
    before = state(tiny_clip)
    d = prefix(tiny_clip, p, p, floor=0.0, steps=60, lr=0.05, weights=(1.0, 0.0))
    with d.patch.apply(tiny_clip.model):
        after = score(p, p.y, clip.zero_shot(tiny_clip, NAMES, d.templates))
    assert after.attacked > accuracies(tiny_clip, p, None).attacked
    assert all(torch.equal(v, before[k]) for k, v in tiny_clip.model.state_dict().items())


def test_the_projection_takes_a_planted_direction_of_letters_away(tiny_clip):
    """A word moves a picture along one direction, which class names have a share of; classes of val are others."""
    g = torch.Generator().manual_seed(0)
    way = nnf.normalize(torch.randn(24, generator=g), dim=0)

    def world(classes):
        T = clip.zero_shot(tiny_clip, classes).T  # all much alike: what tells them apart is the rest
        label = torch.arange(160) % len(classes)
        y = nnf.normalize(T - T.mean(0), dim=1)[label] + 0.02 * torch.randn(160, 24, generator=g)
        push = torch.where(torch.rand(160, 1, generator=g) < 0.5, 2.0, -2.0)
        return embeddings_only(label, (label + 1) % len(classes), y, y + push * way, classes)

    train, val = world(NAMES), world(("ibis", "jay", "kite", "lynx", "mole", "newt"))
    before = accuracies(tiny_clip, val, None)
    assert before.attacked < before.clean - 0.2
    d = projection(tiny_clip, train, val, before.clean - 0.02, ranks=(23 / 24,), lr=0.01)
    W = d.patch.tensors["basis"]
    assert (way @ W @ W.T).norm() < 0.2
    after = score(val, tuple(nnf.normalize(y @ W @ W.T, dim=1) for y in val.y), clip.zero_shot(tiny_clip, val.classes))
    assert min(after.attacked, after.clean) >= before.clean - 0.02


def test_the_projection_folds_into_the_weights(tiny_clip):
    d = Projection(ProjectionConfig(), {"basis": torch.linalg.qr(torch.randn(24, 10)).Q})
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        folded = d.fold(tiny_clip.model)(image=x)["image_features"]
        with d.apply(tiny_clip.model):
            torch.testing.assert_close(tiny_clip.model(image=x)["image_features"], folded)


def test_interpolation_learns_what_it_is_shown_and_leaves_the_base_alone(reading):
    base, p = reading
    before = state(base)
    d = interpolation(base, p, p, floor=0.0, steps=40, batch=20, lr=1e-3)
    assert accuracies(base, p, d).attacked > accuracies(base, p, None).attacked + 0.2
    assert accuracies(base, p, replace(d, strength=0.0)) == accuracies(base, p, None)
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())


def test_a_defence_is_a_patch_at_a_strength(reading):
    """Half of the way between the weights is the mean of them."""
    base, p = reading
    d = interpolation(base, p, p, floor=0.0, steps=2, batch=20, lr=1e-3)
    old = base.model.visual.proj.clone()
    with Arm(d.patch, 0.5).patch.apply(base.model, 0.5):
        torch.testing.assert_close(base.model.visual.proj, (old + d.patch.tensors["visual.proj"]) / 2)
