"""Every architecture of the table, from a checkpoint in the hub's own layout: rows with and without pictures in one
running batch say what transformers' own `generate` says of each alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from patches.families.vlm import base as vlm
from patches.families.vlm.layouts import LAYOUTS, layout
from patches.families.vlm.worker import Picture, PictureDecoder
from registry.errors import NotFound
from tests.patches.families.vlm.models import MODELS, write

TOKENS = 6


def pictures(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray((rng.random((40 + 8 * i, 50, 3)) * 255).astype("uint8")) for i in range(n)]


def prompt(base, text, images):
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
    return base.processor.prompt([{"role": "user", "content": parts}], images)


@torch.inference_mode()
def own_answer(name, base, made):
    """What transformers' generate says."""
    ids = torch.tensor([made.ids])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
    if name.startswith("qwen") and made.pixels:
        how["mm_token_type_ids"] = (ids == base.processor.image_token).int()
    if hasattr(base.model, "model") and hasattr(base.model.model, "rope_deltas"):
        base.model.model.rope_deltas = None
    model = base.model.language_model if name == "instructblip" and not made.pixels else base.model
    out = model.generate(input_ids=ids, **made.pixels, **how)[0].tolist()
    return out[len(made.ids) :] if out[: len(made.ids)] == made.ids else out


@pytest.fixture(params=MODELS)
def loaded(request, tmp_path):
    return request.param, vlm.load(f"local-dir:{write(request.param, tmp_path / 'm')}")


def test_a_running_batch_of_pictures_and_texts_says_what_generate_says(loaded):
    name, base = loaded
    made = [prompt(base, "hello"[: 2 + i], pictures(3)[i : i + 1] if i < 3 else []) for i in range(4)]
    want = [own_answer(name, base, m) for m in made]
    rows = [Picture(m.ids, pixels=m.pixels, max_tokens=TOKENS, watch=(0, 1)) for m in made]
    PictureDecoder(base, slots=3).run(rows)  # three slots: the fourth joins when one has left
    assert [r.out for r in rows] == want
    marks = [i.count(base.processor.image_token) for i in (m.ids for m in made)]
    assert [len(r.features) for r in rows[:3]] == marks[:3]
    assert rows[0].seen.shape == (2, marks[0], base.model.config.get_text_config().hidden_size)
    assert torch.equal(rows[0].seen[0], rows[0].features)
    assert rows[3].seen is None


def test_the_grid_holds_the_image_tokens(loaded):
    name, base = loaded
    made = prompt(base, "hi", pictures(1))
    grids = layout(base.model).grids(base.model, made.pixels)
    count = made.ids.count(base.processor.image_token)
    if grids[0] is None:
        assert name == "instructblip"
        return
    held = sum(r * c for r, c in grids)
    assert held == count or name == "llava_next"  # whose tiles come after the whole picture
    assert held <= count


def test_every_class_has_a_row():
    assert set(vlm.CLASSES.values()) | {"LabVLM"} == set(LAYOUTS)
    with pytest.raises(NotFound, match="Supported: LabVLM"):
        layout("BertModel")


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(NotFound, match="holds a 'bert'"):
        vlm.load(f"local-dir:{tmp_path}")
    with pytest.raises(NotFound, match="names no vision-language base"):
        vlm.load("llava")
