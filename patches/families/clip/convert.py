"""Read checkpoints: open_clip's folders as they are, transformers' CLIPModel converted to open_clip's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.families.base import hub_folder, slug
from patches.families.clip.checks import _check_config
from patches.families.clip.layout import CONFIG, SHIPPED, WEIGHTS
from patches.families.clip.library import open_clip
from patches.families.clip.tokens import TOKENIZER
from registry.errors import NotFound

HUB_FILES = ("open_clip*.safetensors", "open_clip_config.json", *TOKENIZER)
HUB_FILES_TRANSFORMERS = ("model*.safetensors", "config.json", "preprocessor_config.json", *TOKENIZER)


# ---- references ------------------------------------------------------------------------------------------------


def _folder(ref: str) -> tuple[Path, str, dict[str, Any] | None]:
    """Resolve `ref` to a folder, the base's name, and its config if that is not in the folder."""
    scheme, _, rest = ref.partition(":")
    if scheme == "lab" and (SHIPPED / slug(rest) / CONFIG).is_file():
        return SHIPPED / slug(rest), f"lab-{slug(rest)}", None
    if scheme == "local-dir":
        if not Path(rest).is_dir():
            raise NotFound(f"There is no folder {rest}. Give local-dir:path/to/folder.")
        return Path(rest), slug(Path(rest).resolve().name), None
    if scheme == "hf-hub":
        return _hub(rest), slug(rest.partition("@")[0].rpartition("/")[2]), None
    if scheme == "open-clip":
        made, trained = open_clip("factory"), open_clip("pretrained")
        model, _, tag = rest.rpartition("/")
        config, about = made.get_model_config(model or "?"), trained.get_pretrained_cfg(model, tag)
        if config is None or not about.get("hf_hub"):
            tags = ", ".join(trained.list_pretrained_tags_by_model(model or tag)) or "none, no such model"
            raise NotFound(f"open-clip:{rest[:80]} is not in open_clip's table. Tags of {model or tag}: {tags}.")
        # tags record QuickGELU where it was trained with; the table's plain model names do not
        config["quick_gelu"] = bool(about.get("quick_gelu"))
        _check_config(config)
        return _hub(about["hf_hub"].rpartition("/")[0]), slug(rest), {"model_cfg": config, "preprocess_cfg": about}
    raise NotFound(
        f"{ref[:80]!r} names no CLIP. Write lab:clip, open-clip:ViT-B-32/openai, hf-hub:org/name@revision or "
        "local-dir:path."
    )


def knows(folder: Path) -> str:
    """What a folder is, if it is a CLIP in open_clip's layout or transformers'."""
    if (folder / CONFIG).is_file():
        _check_config(_json(folder / CONFIG).get("model_cfg"))
        return "a CLIP in open_clip's layout"
    if (folder / "config.json").is_file() and _json(folder / "config.json").get("model_type") == "clip":
        return "a CLIP in transformers' layout"
    return ""


def _hub(rest: str) -> Path:
    folder = hub_folder(rest, HUB_FILES)
    return folder if any(folder.glob("open_clip*.safetensors")) else hub_folder(rest, HUB_FILES_TRANSFORMERS)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except ValueError:
        raise NotFound(f"{file} is not JSON.") from None
    if not isinstance(value, dict):
        raise NotFound(f"{file} is not a JSON object.")
    return value


def _open_clip_state(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder in open_clip's layout."""
    from safetensors.torch import load_file

    for name in (WEIGHTS, "open_clip_pytorch_model.safetensors"):
        if (folder / name).is_file():
            return {k.removeprefix("text."): v for k, v in load_file(folder / name).items()}
    raise NotFound(f"{folder} has no {WEIGHTS}. Only safetensors are read; convert a .bin or .pt file first.")


def _from_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and weights of a CLIPModel saved by transformers, converted to open_clip's layout."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig

    raw = _json(folder / "config.json")
    if raw.get("model_type") != "clip":
        raise NotFound(
            f"{folder} holds a {raw.get('model_type')!r} model; of transformers' layouts only 'clip' is read."
        )
    c = CLIPConfig.from_dict(raw)
    acts = {"quick_gelu": True, "gelu": False}
    if c.vision_config.hidden_act != c.text_config.hidden_act or c.text_config.hidden_act not in acts:
        raise NotFound(
            f"{folder} uses {c.vision_config.hidden_act} and {c.text_config.hidden_act}; both towers must use one of "
            f"{', '.join(acts)}."
        )

    def shared(t: Any) -> dict[str, Any]:
        return {
            "width": t.hidden_size,
            "layers": t.num_hidden_layers,
            "mlp_ratio": t.intermediate_size / t.hidden_size,
            "norm_kwargs": {"eps": t.layer_norm_eps},
        }

    v, t = c.vision_config, c.text_config
    model_cfg = {
        "embed_dim": c.projection_dim,
        "quick_gelu": acts[t.hidden_act],
        "vision_cfg": {
            **shared(v),
            "image_size": v.image_size,
            "patch_size": v.patch_size,
            "head_width": v.hidden_size // v.num_attention_heads,
        },
        "text_cfg": {
            **shared(t),
            "context_length": t.max_position_embeddings,
            "vocab_size": t.vocab_size,
            "heads": t.num_attention_heads,
            "hf_tokenizer_name": "tokenizer.json",
            # transformers marks OpenAI's own checkpoints by eos_token_id 2; their end token has the highest id
            **({} if t.eos_token_id == 2 else {"pool_type": "eos", "eos_id": t.eos_token_id}),
        },
    }
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise NotFound(f"{folder} has no model.safetensors. Only safetensors are read; convert a .bin file first.")
    state = {k: x for f in files for k, x in load_file(f).items()}
    return {"model_cfg": model_cfg, "preprocess_cfg": _transformers_preprocess(folder, v.image_size)}, _rename(state)


def _transformers_preprocess(folder: Path, size: int) -> dict[str, Any]:
    file = next(
        (folder / f for f in ("preprocessor_config.json", "processor_config.json") if (folder / f).is_file()), None
    )
    about = _json(file) if file else {}
    about = about.get("image_processor", about)
    resize = about.get("size", {"shortest_edge": size})
    edge = resize.get("shortest_edge", resize.get("height")) if isinstance(resize, dict) else resize
    if edge != size:
        raise NotFound(f"{folder} resizes images to {edge} but its tower takes {size}; such a crop is not supported.")
    squash = isinstance(resize, dict) and "height" in resize
    return {
        **({"mean": about["image_mean"], "std": about["image_std"]} if "image_mean" in about else {}),
        "interpolation": "bilinear" if about.get("resample") == 2 else "bicubic",
        "resize_mode": "squash" if squash else "shortest",
    }


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape transformers' CLIP parameters to open_clip's."""
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    outer = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
        "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
        "vision_model.post_layernorm.weight": "visual.ln_post.weight",
        "vision_model.post_layernorm.bias": "visual.ln_post.bias",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    out: dict[str, Tensor] = {}
    for key, x in state.items():
        tower, _, rest = key.partition(".encoder.layers.")
        if rest:
            layer, _, name = rest.partition(".")
            module, _, kind = name.rpartition(".")
            block = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{layer}"
            if module in inner:
                out[f"{block}.{inner[module]}.{kind}"] = x
            elif module == "self_attn.q_proj":
                qkv = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
        elif key in outer:
            out[outer[key]] = x
        elif key in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if key.startswith("visual") else "text_projection"] = x.T.contiguous()
        elif key == "logit_scale":
            out[key] = x
    return out
