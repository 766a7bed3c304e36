"""Streams: recorded activations give the answers of the patched forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.engine.patch import ONLY
from patches.families import clip
from patches.mechanisms.features import edit
from patches.subject import Subject
from tests.training.clip_sae.some import TINY, F, some_sae
from training.clip_sae.streams import answers, applied, streams
from training.tasks.recognition import ask, classifier, pictures


@pytest.mark.parametrize("hook", ["block", "mlp"])
def test_a_stream_gives_the_answers_of_the_patched_forward(tiny_clip, hook):
    """What candidates are judged by is what is served: same mechanism, same rest of the tower."""
    config = replace(TINY, layers=(0, 1, 2), hook=hook)
    data = pictures(config, "val", 20)["attacked"]
    weights = classifier(tiny_clip, config, data)
    for layer, stream in streams(tiny_clip, config, data).items():
        for patch in (None, edit(some_sae(), clip.site(hook, layer), range(0, F, 3), "clamp", 0.7)):
            got = answers(tiny_clip, layer, stream, weights, applied(patch) if patch else lambda x: x)
            model = Subject(tiny_clip, {ONLY: patch} if patch else {})
            want = ask(tiny_clip, config, data, weights)
            model.close()
            torch.testing.assert_close(got.logits, want.logits, atol=1e-3, rtol=1e-4)
            assert torch.equal(got.label, want.label)
            assert torch.equal(got.other, want.other)
