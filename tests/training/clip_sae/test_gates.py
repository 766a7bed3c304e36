"""Learned gates close what leads astray, and nothing that is needed."""

from dataclasses import replace

import torch

from patches.mechanisms.features import SAE
from training.clip_sae.gates import GateConfig, Lesson, learn

D, F, C = 16, 16, 3


def world():
    """Orthogonal features: 0 to 2 say the class; 7 and 8 together overrule it; the others are noise."""
    W = torch.eye(D)
    sae = SAE(W, torch.zeros(F), W, torch.zeros(D))
    g = torch.Generator().manual_seed(0)
    read = torch.zeros(D, C)
    read[0, 0] = read[1, 1] = read[2, 2] = 1.0
    read[7, 0] = read[8, 0] = 3.0
    label = torch.arange(24) % 3
    clean = 0.1 * torch.rand(24, 5, D, generator=g)
    clean[..., 7:9] = 0.0
    clean[torch.arange(24), :, label] += 2.0
    hit = clean.clone()
    hit[:, 3, 7:9] += 6.0
    return sae, read, clean, hit, label


def lessons(x, read, label, size=8):
    ones = torch.ones(size)
    return [
        Lesson(x[i : i + size], lambda v: v.mean(1) @ read * 5, label[i : i + size], ones)
        for i in range(0, len(x), size)
    ]


def test_what_leads_astray_is_closed_even_if_two_features_stand_in_for_each_other():
    sae, read, clean, hit, label = world()
    gates = learn(GateConfig(steps=120, price=1e-2), sae, lessons(hit, read, label), lessons(clean, read, label))
    assert (gates[[7, 8]] < 0.2).all()
    assert (gates[:3] > 0.8).all()
    others = [j for j in range(F) if j not in (0, 1, 2, 7, 8)]
    assert (gates[others] > 0.8).all()


def test_a_feature_that_fires_outside_the_edited_tokens_does_not_matter():
    sae, read, clean, hit, label = world()
    gates = learn(
        GateConfig(steps=60, price=1e-2), sae, lessons(hit, read, label), lessons(clean, read, label), slice(0, 1)
    )
    assert gates[7] > 0.8  # it fires on token 3 alone


def test_the_same_seed_learns_the_same_gates():
    sae, read, clean, hit, label = world()
    a, b = (learn(GateConfig(steps=9), sae, lessons(hit, read, label), lessons(clean, read, label)) for _ in range(2))
    assert torch.equal(a, b)


def test_what_is_shunned_is_said_less_where_no_right_answer_is_left():
    sae, read, clean, hit, label = world()
    covered = hit.clone()
    covered[..., :3] = 0.0  # the strip hides what says the class
    word = torch.zeros_like(label)
    word[label == 0] = 1
    read = read.clone()
    read[8] = torch.tensor([0.0, 6.0, 0.0])  # 7 is the word of class 0, 8 that of class 1
    for i, w in enumerate(word.tolist()):
        covered[i, 3, 8 - w] = 0.0

    def fitted(shun, names=True):
        hard = [
            replace(one, shunned=word[8 * i : 8 * i + 8] if names else None)
            for i, one in enumerate(lessons(covered, read, label))
        ]
        gates = learn(GateConfig(steps=60, price=8.0, low=0.0, shun=shun), sae, hard, lessons(clean, read, label))
        x = covered - (covered * (1 - gates)) @ sae.decoder
        return gates, (x.mean(1) @ read * 5).softmax(1).gather(1, word[:, None]).mean()

    (plain, said), (gates, less), (unnamed, _) = fitted(0.0), fitted(3.0), fitted(3.0, names=False)
    assert less < said - 0.03, (float(less), float(said))
    assert torch.equal(unnamed, plain)
    assert (gates[:3] > 0.8).all()
