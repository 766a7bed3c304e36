"""CLIP as open_clip and transformers have it, with every part in reach of a hook."""

import json
import shutil
import time
import warnings
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from patches.engine.edits import Act
from patches.engine.patch import Patch, apply
from patches.engine.read import record
from patches.families import clip
from patches.families.base import load_base
from patches.families.clip.tokens import _letters
from patches.subject import Subject
from registry.errors import BadArtifact, Invalid, NotFound

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a cat", "two dogs", "the word 7"]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def saved(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "saved"
    clip.save(tiny_clip, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A saved base that the test may change."""
    return shutil.copytree(saved, tmp_path / "saved")


def edited(folder, **changes):
    """The folder with model_cfg changed: None removes a key, a dict is merged."""
    about = json.loads((folder / clip.CONFIG).read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            about["model_cfg"].setdefault(key, {}).update(value)
        elif value is None:
            about["model_cfg"].pop(key)
        else:
            about["model_cfg"][key] = value
    (folder / clip.CONFIG).write_text(json.dumps(about))
    return folder


# ---- the explicit attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("quick", [True, False])
def test_the_swap_changes_no_embedding(heads, quick):
    from open_clip.model import CLIP

    torch.manual_seed(3)
    config = json.loads(json.dumps(clip.tiny().model.config["model_cfg"]))
    config["quick_gelu"], config["vision_cfg"]["head_width"], config["text_cfg"]["heads"] = quick, 32 // heads, heads
    stock = CLIP(**config).eval()
    for p in stock.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    ours = clip.explicit_attention(deepcopy(stock))
    assert not any(isinstance(m, nn.MultiheadAttention) for m in ours.modules())
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, t = torch.randn(5, 3, 32, 32), torch.randint(0, 97, (5, 24))
    with torch.no_grad():
        close(ours.visual(x), stock.visual(x))
        close(ours.encode_text(t), stock.encode_text(t))


def test_in_float64_the_swap_is_exact_to_twelve_digits(tiny_clip):
    from open_clip.model import CLIP

    stock = CLIP(**tiny_clip.model.config["model_cfg"]).eval()
    stock.load_state_dict(tiny_clip.model.state_dict())
    stock, ours, x = stock.double(), deepcopy(tiny_clip.model).double(), torch.randn(3, 3, 32, 32).double()
    with torch.no_grad():
        close(ours.visual(x), stock.visual(x), atol=1e-12)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_site_fires(tiny_clip, tower):
    sites = [clip.site(name, 1, tower) for name in clip.SITES]
    x = tiny_clip.processor.image(IMAGES) if tower == "image" else tiny_clip.processor.text(TEXTS)
    with torch.no_grad(), record(tiny_clip.model, sites) as acts:
        tiny_clip.model(**{tower: x})
    assert {s: len(a) for s, a in acts.items()} == {s: 1 for s in sites}
    B, T = (4, 17) if tower == "image" else (3, 24)
    shapes = {name: tuple(acts[clip.site(name, 1, tower)][0].shape) for name in clip.SITES}
    assert shapes["pattern"] == (B, 4, T, T)
    assert shapes["values"] == (B, 4, T, 8)
    assert all(shapes[n] == (B, T, 32) for n in ("embed", "block", "attn", "mlp", "heads", "neurons", "ln_post"))


def test_the_pattern_is_attention_and_its_values_make_the_heads(tiny_clip):
    names = {n: clip.site(n, 2) for n in ("pattern", "values")}
    x = tiny_clip.processor.image(IMAGES)
    with torch.no_grad():
        plain = tiny_clip.model.visual(x)
        with (
            record(tiny_clip.model, names.values()) as out,
            record(tiny_clip.model, [clip.site("heads", 2)], "input") as z,
        ):
            close(tiny_clip.model.visual(x), plain)
    pattern, values = (out[s][0] for s in names.values())
    close(pattern.sum(-1), torch.ones(4, 4, 17))
    close((pattern @ values).transpose(1, 2).flatten(2), z[clip.site("heads", 2)][0])


def test_the_text_tower_never_looks_ahead(tiny_clip):
    site = clip.site("pattern", 0, "text")
    with torch.no_grad(), record(tiny_clip.model, [site]) as acts:
        tiny_clip.model(text=tiny_clip.processor.text(TEXTS))
    assert (acts[site][0].triu(1) == 0).all()


def test_parts_of_a_block_add_up(tiny_clip):
    sites = [clip.site("block", 0), *(clip.site(n, 1) for n in ("attn", "mlp", "block"))]
    with torch.no_grad(), record(tiny_clip.model, sites) as acts:
        tiny_clip.model(image=tiny_clip.processor.image(IMAGES))
    before, attn, mlp, after = (acts[s][0] for s in sites)
    close(before + attn + mlp, after)


def test_the_embedding_is_the_class_token_projected(tiny_clip):
    v = tiny_clip.model.visual
    x = tiny_clip.processor.image(IMAGES)
    with torch.no_grad(), record(tiny_clip.model, ["visual.ln_post"]) as acts:
        close(v(x), acts["visual.ln_post"][0][:, 0] @ v.proj)


# ---- pictures and texts ----------------------------------------------------------------------------------------


def test_a_batch_equals_its_pictures_at_any_size(tiny_clip):
    for size in ((32, 32), (40, 50), (17, 23)):
        x = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
        pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in x]
        close(tiny_clip.processor.image(x), tiny_clip.processor.image(pictures), atol=1e-6)


def test_pictures_are_prepared_as_open_clip_does(folder):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    base = clip.load(f"local-dir:{folder}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    assert torch.equal(base.processor.image(picture)[0], transform(picture))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(base.processor.text(TEXTS), tokens)
    with torch.no_grad():
        close(clip.embed_images(base, picture), model.eval().encode_image(transform(picture)[None], normalize=True))
        close(clip.embed_texts(base, TEXTS), model.encode_text(tokens, normalize=True))


@pytest.mark.parametrize(
    "bad",
    [
        [],
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8),
    ],
)
def test_what_is_no_image_batch_is_refused(tiny_clip, bad):
    with pytest.raises(Invalid, match="image"):
        tiny_clip.processor.image(bad)


def test_batches_do_not_change_embeddings(tiny_clip):
    close(clip.embed_images(tiny_clip, IMAGES, batch=3), clip.embed_images(tiny_clip, IMAGES))
    close(clip.embed_texts(tiny_clip, TEXTS, batch=2), clip.embed_texts(tiny_clip, TEXTS))


def test_zero_shot_averages_templates_of_unit_embeddings(tiny_clip):
    templates = ("a {}", "{}, big")
    got = clip.zero_shot(tiny_clip, TEXTS, templates)
    parts = [clip.embed_texts(tiny_clip, [t.replace("{}", x) for x in TEXTS]) for t in templates]
    close(got, torch.nn.functional.normalize(parts[0] + parts[1], dim=-1).T)
    close(got.norm(dim=0), torch.ones(3))
    assert clip.logit_scale(tiny_clip) == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "templates", "why"),
    [([], ("{}",), "at least one"), (["a", "b", "a"], ("{}",), "'a' occurs twice"), (["a"], ("a photo",), "no {}")],
)
def test_labels_that_make_no_classifier_are_refused(tiny_clip, labels, templates, why):
    with pytest.raises(Invalid, match=why):
        clip.zero_shot(tiny_clip, labels, templates)


def test_braces_in_a_label_are_only_text(tiny_clip):
    assert clip.zero_shot(tiny_clip, ["{0.__class__}", "b"]).shape == (24, 2)


# ---- folders ---------------------------------------------------------------------------------------------------


def test_tiny_is_quick_random_and_repeatable():
    clip.tiny()
    start = time.process_time()
    a, b = clip.tiny(5), load_base("tiny:5", "clip")
    assert time.process_time() - start < 2
    assert a.digest == b.digest != clip.tiny(6).digest


def test_a_saved_base_loads_as_it_was(tiny_clip, folder):
    again = load_base(f"local-dir:{folder}", "clip")
    assert torch.equal(clip.embed_images(again, IMAGES), clip.embed_images(tiny_clip, IMAGES))
    assert torch.equal(clip.embed_texts(again, TEXTS), clip.embed_texts(tiny_clip, TEXTS))
    assert again.label == f"local:saved@{again.digest}"
    assert clip.load(f"local-dir:{folder}").digest == again.digest


def test_half_weights_are_another_base(tiny_clip, folder, tmp_path):
    clip.save(tiny_clip, tmp_path / "half", torch.float16)
    half = clip.load(f"local-dir:{tmp_path / 'half'}")
    assert half.digest != clip.load(f"local-dir:{folder}").digest
    close(clip.embed_images(half, IMAGES), clip.embed_images(tiny_clip, IMAGES), atol=1e-2)


def test_the_wrong_activation_is_refused_by_the_golden_embedding(folder):
    edited(folder, quick_gelu=False)
    with pytest.raises(BadArtifact, match='With QuickGELU they agree: set "quick_gelu": true'):
        clip.load(f"local-dir:{folder}")


def test_a_changed_weight_is_refused_by_the_golden_embedding(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / clip.WEIGHTS)
    state["visual.proj"][0, 0] += 0.1
    save_file(state, folder / clip.WEIGHTS)
    with pytest.raises(BadArtifact, match="get the folder again"):
        clip.load(f"local-dir:{folder}")


def test_another_preprocessing_is_refused_by_the_golden_embedding(folder):
    about = json.loads((folder / clip.CONFIG).read_text())
    about["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (folder / clip.CONFIG).write_text(json.dumps(about))
    with pytest.raises(BadArtifact, match="differ by"):
        clip.load(f"local-dir:{folder}")


def test_without_a_golden_embedding_a_silent_activation_is_said_aloud(folder):
    (folder / clip.GOLDEN).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.load(f"local-dir:{folder}")
    with pytest.warns(UserWarning, match="GELU is assumed"):
        clip.load(f"local-dir:{edited(folder, quick_gelu=None)}")


def test_a_name_that_tells_the_activation_is_believed(folder):
    (folder / clip.GOLDEN).unlink()
    folder = edited(folder, quick_gelu=None).rename(folder.parent / "ViT-B-32.openai")
    with pytest.raises(NotFound, match="trained with QuickGELU, but the config says quick_gelu=False"):
        clip.load(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "timm model"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "ResNet"),
        ({"vision_cfg": {"attentional_pool": True}}, "pools by attention"),
        ({"vision_cfg": {"pool_type": "avg"}}, "does not pool the class token"),
        ({"vision_cfg": {"final_ln_after_pool": True}}, "does not pool the class token"),
        ({"vision_cfg": {"ls_init_value": 1e-5}}, "LayerScale"),
        ({"vision_cfg": {"qk_norm": True}}, "not CLIP's own"),
        ({"multimodal_cfg": {"width": 8}}, "CoCa"),
        ({"init_logit_bias": -10.0}, "SigLIP"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "another library's"),
        ({"text_cfg": {"embed_cls": True}}, "class token"),
        ({"vision_cfg": {"colour": "red"}}, "cannot build"),
        ({"vision_cfg": {"width": 64}}, "do not fit the config"),
    ],
)
def test_layouts_that_are_not_clip_are_refused_with_the_reason(folder, changes, why):
    with pytest.raises(NotFound, match=why):
        clip.load(f"local-dir:{edited(folder, **changes)}")


@pytest.mark.parametrize("config", ["{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": {}}}', "[1]", "no JSON"])
def test_a_config_that_says_nothing_is_refused(folder, config):
    (folder / clip.CONFIG).write_text(config)
    with pytest.raises(NotFound, match="no vision_cfg and text_cfg|not a JSON object|not JSON"):
        clip.load(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("ref", "why"),
    [
        ("nonsense", "names no CLIP"),
        ("lab:../../etc", "names no CLIP"),
        ("local-dir:/no/such/folder", "no folder"),
        ("open-clip:ViT-B-32/no-such-tag", "Tags of ViT-B-32: openai"),
        ("open-clip:RN50/openai", "ResNet"),
        ("open-clip:coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("open-clip:ViT-B-32/openai", "cannot be fetched.*local-dir"),
        ("hf-hub:org/none@main", "cannot be fetched.*local-dir"),
    ],
)
def test_references_that_lead_nowhere_say_the_way(ref, why):
    with pytest.raises(NotFound, match=why):
        clip.load(ref)


def test_pickles_are_never_read(folder):
    (folder / clip.WEIGHTS).rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(NotFound, match="Only safetensors are read"):
        clip.load(f"local-dir:{folder}")


def test_a_custom_text_checkpoint_is_the_same_base(tiny_clip, folder):
    """open_clip stores the text tower under text. when trained with --force-custom-text."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / clip.WEIGHTS)
    top = {"visual", "logit_scale"}
    save_file({k if k.split(".")[0] in top else f"text.{k}": v for k, v in state.items()}, folder / clip.WEIGHTS)
    again = clip.load(f"local-dir:{edited(folder, custom_text=True)}")
    assert torch.equal(clip.embed_texts(again, TEXTS), clip.embed_texts(tiny_clip, TEXTS))


# ---- transformers' layout --------------------------------------------------------------------------------------


def their_model(tmp_path, act="quick_gelu", eos=2):
    """A random CLIPModel in the layout transformers writes, with a tokenizer whose end has the highest id."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(1)
    shared = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "hidden_act": act,
        "layer_norm_eps": 1e-4,
        "initializer_range": 0.3,
    }
    text = {**shared, "num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 24, "eos_token_id": eos}
    vision = {**shared, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    _letters(97).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3)
    images.save_pretrained(folder)
    return model, images, folder


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 2), ("gelu", 96)])
def test_a_transformers_checkpoint_gives_transformers_embeddings(tmp_path, act, eos):
    from transformers import AutoTokenizer

    model, prepare, folder = their_model(tmp_path, act, eos)
    base = clip.load(f"local-dir:{folder}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    pixels = prepare(picture, return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        close(base.model(image=pixels)["image_features"], out.image_embeds)
        close(clip.embed_texts(base, TEXTS), out.text_embeds)
    # torchvision and PIL resize a picture to within a grey level of each other
    close(base.processor.image(picture), pixels, atol=2 / 255 / 0.26)
    assert clip.logit_scale(base) == pytest.approx(model.logit_scale.exp().item())
    clip.save(base, tmp_path / "ours")
    close(clip.embed_texts(clip.load(f"local-dir:{tmp_path / 'ours'}"), TEXTS), out.text_embeds)


def test_other_models_of_transformers_are_refused(tmp_path):
    _, _, folder = their_model(tmp_path)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "model_type": "siglip"}))
    with pytest.raises(NotFound, match="'siglip'"):
        clip.load(f"local-dir:{folder}")


# ---- patches on it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteConfig:
    """Where."""

    site: str


@dataclass(frozen=True)
class Halve(Patch):
    """Halve what leaves a site, and see the tower's input while at it."""

    Config = SiteConfig

    def edits(self):
        return [Act(self.config.site, lambda x, inputs: x * (0.5 if {"image", "text"} & inputs.keys() else 1.0))]


@pytest.mark.parametrize("name", ["embed", "block", "attn", "values", "pattern", "heads", "mlp", "neurons", "ln_post"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_rows_of_a_batch_name_arms_at_every_site(tiny_clip, name, tower):
    base = tiny_clip
    x = {tower: base.processor.image(IMAGES) if tower == "image" else base.processor.text([*TEXTS, "d"])}
    feature = f"{tower}_features"
    patch = Halve(SiteConfig(clip.site(name, 0, tower)), {})
    with torch.no_grad():
        before = base.model(**x)[feature]
    model = Subject(base, {"a": patch})
    after = model(["a"] * 4, **x)[feature]
    mixed = model([None, "a", None, "a"], **x)[feature]
    assert model.applied.unreached() == []
    model.close()
    if name != "ln_post":  # the embedding has unit norm, so halving the last stream changes nothing
        assert (after - before).abs().max() > 1e-3
    close(mixed[::2], before[::2])
    close(mixed[1::2], after[1::2])
    with torch.no_grad():
        assert torch.equal(base.model(**x)[feature], before)
    with apply(base.model, {"patch": patch}, strength=0.0), torch.no_grad():
        assert torch.equal(base.model(**x)[feature], before)
