"""CLIP: any open_clip model with a plain vision transformer, and transformers' CLIPModel, in one common layout.

References: `lab:clip` (ships here), `open-clip:ViT-B-32/openai` (model/tag of open_clip's table), `local-dir:path` and
`hf-hub:org/name@revision` (open_clip's or transformers' layout). Only safetensors are read. A folder that `save` wrote
is also a `local-dir:` of open_clip itself, plus a golden embedding that `load` checks: a wrong activation (QuickGELU,
the classic), tokenizer, preprocessing or weight is detected at once.

`base.model(image=x)` and `base.model(text=t)` run a tower: open_clip's forward by keyword, which returns
{"image_features", "text_features", "logit_scale"}, features of unit norm. So `root` is the model itself and rows of a
batch may name arms. The module `visual` returns features before normalisation.

Shapes: B images or texts, T tokens (the class token first), D width, H heads, e = D/H, k joint space.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.families.base import Base, check_device
from patches.families.clip.attention import explicit_attention
from patches.families.clip.checks import (
    GOLDEN_TEXTS,
    _check_activation,
    _check_config,
    _check_golden,
    _golden,
    _golden_images,
)
from patches.families.clip.convert import _folder, _from_transformers, _json, _open_clip_state
from patches.families.clip.layout import CONFIG, GOLDEN, WEIGHTS
from patches.families.clip.library import open_clip
from patches.families.clip.tokens import _letters, _tokenizer
from registry import manifest
from registry.errors import Invalid, NotFound


@dataclass(frozen=True)
class Processor:
    """Preprocessing of images and texts into the model's inputs, exactly as open_clip does it."""

    transform: Callable[[Any], Tensor]
    """open_clip's inference transform of a PIL image"""
    tokenizer: Callable[[list[str]], Tensor]
    size: tuple[int, int]
    """Height and width of the model's input in pixels"""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def image(self, images: Any) -> Tensor:
        """Preprocess one PIL image, a sequence of them, or uint8 (B, 3, H, W) into (B, 3, h, w) float32.

        A uint8 batch of the model's own size is only normalised, on its own device, as a renderer wants. Other sizes
        are resized by PIL image by image, so that a tensor and its image never differ. Raises Invalid.
        """
        if not isinstance(images, Tensor):
            many = list(images) if isinstance(images, Sequence) else [images]
            if not many:
                raise Invalid("There is no image to embed; give at least one.")
            return torch.stack([self.transform(picture) for picture in many])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise Invalid(
                f"An image batch must be a uint8 tensor (B, 3, H, W), not {images.dtype} {tuple(images.shape)}."
            )
        if tuple(images.shape[-2:]) == self.size:
            mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
            return (images.float() / 255 - mean) / std
        from torchvision.transforms.functional import to_pil_image

        return self.image([to_pil_image(picture.cpu()) for picture in images]).to(images.device)

    def shown(self, x: Tensor) -> Tensor:
        """Undo the normalisation: inputs (..., 3, h, w) to images in [0, 1]."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return x * std + mean

    def text(self, texts: Sequence[str]) -> Tensor:
        """Tokenise texts to ids (B, context), truncated to the context as open_clip does."""
        if isinstance(texts, str):
            raise Invalid(f"Texts must be a list of strings, not the string {texts[:40]!r}.")
        return self.tokenizer(list(texts))


# ---- loading ---------------------------------------------------------------------------------------------------


def load(ref: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load the base that `ref` names, in eval mode, and check its golden embedding if it has one.

    Raises NotFound saying what to put where or why a layout is not supported, BadArtifact if the golden embedding
    differs, NotReady if CUDA was asked for and is missing.
    """
    check_device(device)
    folder, name, config = _folder(ref)
    if config is None and (folder / CONFIG).is_file():
        config = _json(folder / CONFIG)
    if config is not None:
        state = _open_clip_state(folder)
    elif (folder / "config.json").is_file():
        config, state = _from_transformers(folder)
    else:
        raise NotFound(
            f"{folder} has neither {CONFIG} nor config.json. Give a folder in open_clip's local-dir: layout, or one "
            "that transformers' CLIPModel.save_pretrained wrote."
        )
    _check_config(config.get("model_cfg"))
    _check_activation(ref, name, config, (folder / GOLDEN).is_file())
    tokenizer, tokens = _tokenizer(folder, config["model_cfg"]["text_cfg"])
    base = _base(ref, name, config, state, tokenizer, tokens)
    if (folder / GOLDEN).is_file():
        _check_golden(base, folder / GOLDEN)
    base.model.to(device=device, dtype=dtype)
    return base


def new(config: Mapping[str, Any], tokenizer_folder: Path | None = None, seed: int = 0, name: str = "clip") -> Base:
    """Create an untrained model from open_clip's config {"model_cfg", "preprocess_cfg"}, for training.

    tokenizer_folder: folder of tokenizer.json, if `text_cfg` names a tokenizer of its own.
    """
    tokenizer, tokens = _tokenizer(tokenizer_folder or Path(), config["model_cfg"]["text_cfg"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _base(f"new:{seed}", name, config, None, tokenizer, tokens)


def tiny(seed: int = 0, layers: int = 3) -> Base:
    """Create a random CLIP of 32 px with a one-character tokenizer: under a second, offline, all real interfaces."""
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": layers, "head_width": 8},
            "text_cfg": {
                "context_length": 24,
                "vocab_size": 97,
                "width": 32,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "tokenizer.json",
            },
        },
        "preprocess_cfg": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        _letters(97).save_pretrained(folder)
        base = new(config, Path(folder), seed, "tiny-clip")
    generator = torch.Generator().manual_seed(seed)
    for key, p in base.model.named_parameters():  # biases of 0 and gains of 1 would hide mistakes
        if key != "logit_scale":
            noise = torch.randn(p.shape, generator=generator)
            p.data = 1 + 0.2 * noise if key.endswith("weight") and p.ndim == 1 else 0.2 * noise
    return Base(
        f"tiny:{seed}", base.name, _digest(base.model, "letters"), base.model, base.processor, base.root, "clip"
    )


def save(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `base` in open_clip's `local-dir:` layout, weights in `dtype`, with its golden embedding."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in base.model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    if hasattr(base.processor.tokenizer, "save_pretrained"):
        base.processor.tokenizer.save_pretrained(folder)
    (folder / GOLDEN).unlink(missing_ok=True)
    (folder / CONFIG).write_text(json.dumps(base.model.config, indent=2) + "\n")
    again = load(f"local-dir:{folder}")  # reloaded, so that the golden embedding is that of the rounded weights
    save_file(
        {"images": _golden_images(), **_golden(again, _golden_images(), GOLDEN_TEXTS)},
        folder / GOLDEN,
        {"texts": json.dumps(GOLDEN_TEXTS)},
    )


# ---- building and checking -------------------------------------------------------------------------------------


def _base(
    ref: str,
    name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    tokenizer: Callable[[list[str]], Tensor],
    tokens: str,
) -> Base:
    transform = open_clip("transform")
    model_cfg = {k: v for k, v in config["model_cfg"].items() if k != "custom_text"}
    _check_config(model_cfg)
    try:
        model: Any = open_clip("model").CLIP(**{**model_cfg, "output_dict": True})
    except (TypeError, ValueError, AssertionError) as e:
        raise NotFound(f"{name}: open_clip cannot build this config ({e}).") from None
    if state is not None:
        own = model.state_dict()
        state = {k: v.reshape(own[k].shape) if k == "logit_scale" else v for k, v in state.items()}
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise NotFound(f"{name}: the weights do not fit the config. {' '.join(str(e).split())[:400]}") from None
    explicit_attention(model).eval()
    size = model.visual.image_size
    known = transform.merge_preprocess_dict(
        transform.PreprocessCfg(), {**config.get("preprocess_cfg", {}), "size": size}
    )
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    cfg = transform.PreprocessCfg(**known)
    model.config = {"model_cfg": {"quick_gelu": False, **model_cfg}, "preprocess_cfg": known}
    processor = Processor(
        transform.image_transform_v2(cfg, is_train=False), tokenizer, size, tuple(cfg.mean), tuple(cfg.std)
    )
    return Base(ref, name, _digest(model, tokens), model, processor, "", "clip")


def _digest(model: Any, tokens: str) -> str:
    """Digest everything that determines an embedding, independent of the checkpoint's layout.

    Weights, architecture, preprocessing and tokenizer.
    """
    about = {
        "activation": type(model.visual.transformer.resblocks[0].mlp.gelu).__name__,
        "heads": [model.visual.transformer.resblocks[0].attn.heads, model.transformer.resblocks[0].attn.heads],
        "eps": [model.visual.ln_post.eps, model.ln_final.eps],
        "pool": [model.text_pool_type, model.text_eos_id if model.text_pool_type == "eos" else None],
        "causal": model.attn_mask is not None,
        "preprocess": model.config["preprocess_cfg"],
        "tokenizer": tokens,
        "weights": {
            k: [str(v.dtype), list(v.shape), hashlib.sha256(v.detach().cpu().contiguous().numpy()).hexdigest()]
            for k, v in model.state_dict().items()
        },
    }
    return manifest.digest_of(about)
