"""The planted neuron, and a reader of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from patches.engine.read import record
from patches.evidence.neuron_cards import (
    Layer,
    NeuronCards,
    Reader,
)
from patches.families import clip
from patches.families.clip.second_order import directions, lens, look, scalars
from tests.training.second_order.some import LAST, LAYER, NEURON, WORDS, colours
from training.second_order.omp import atoms, pursue


@pytest.fixture(scope="module")
def planted():
    """A random tower of two blocks; neuron 5 of the first fires on red patches alone, and one head of the second brings
    what it writes to the text "red"."""
    base = clip.tiny(layers=2)
    base = replace(base, model=deepcopy(base.model))
    blocks, visual = base.model.visual.transformer.resblocks, base.model.visual
    x = base.processor.image(colours()[0])
    red = atoms(clip.embed_texts(base, WORDS, clip.TEMPLATES))[0]
    with torch.no_grad():
        with record(base.model, ["visual.transformer.resblocks.0.ln_2"]) as acts:
            base.model(image=x)
        z = acts["visual.transformer.resblocks.0.ln_2"][0]
        is_red = torch.nn.functional.max_pool2d(colours()[1][:, None].float(), 8)[:, 0].flatten(1).bool()
        patches = z[:, 1:].reshape(-1, 32)
        want = torch.where(is_red.flatten(), 4.0, -4.0)
        design = torch.cat([patches, torch.ones(len(patches), 1)], 1)
        row = torch.linalg.lstsq(design, want[:, None]).solution[:, 0]
        blocks[0].mlp.c_fc.weight[NEURON], blocks[0].mlp.c_fc.bias[NEURON] = row[:-1], row[-1]
        # head 0 of the last block: even attention, and value 0 is what neuron 5 writes
        attn, D, e = blocks[LAST].attn, 32, 8
        way = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(3)), dim=0)
        way = torch.nn.functional.normalize(way - way.mean(), dim=0)
        blocks[0].mlp.c_proj.weight[:, NEURON] = way
        attn.in_proj_weight[:e], attn.in_proj_bias[:e] = 0, 0  # queries of head 0
        value = attn.in_proj_weight[2 * D :]
        seen = blocks[LAST].ln_1.weight * way
        value -= torch.outer(value @ seen, seen) / seen.dot(seen)  # nobody else reads it
        value[0] += seen / seen.dot(seen)
        to_y = visual.ln_post.weight[:, None] * visual.proj
        to_y = to_y - to_y.mean(0)
        attn.out_proj.weight[:, 0] = torch.linalg.lstsq(to_y.T, red[:, None]).solution[:, 0]
    return base


@pytest.fixture(scope="module")
def reader(planted):
    images, _ = colours(40, 1)
    x = planted.processor.image(images)
    seen, at = look(planted, x, [LAYER]), lens(planted, LAYER)
    known = directions(at, [scalars(seen, LAYER)], keep=8)
    pool = clip.embed_texts(planted, WORDS, clip.TEMPLATES)
    said = pursue(known.direction, atoms(pool), 3)
    rest = seen.p[LAYER].mean((0, 1))
    one = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    return Reader.of(planted, NeuronCards({LAYER: one}, WORDS, pool, images))
