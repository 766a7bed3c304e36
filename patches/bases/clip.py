"""CLIP: any open_clip model with a plain vision transformer, and transformers' CLIPModel, in one and the same layout.

References: `lab:clip` (ships here), `open-clip:ViT-B-32/openai` (model/tag of open_clip's table), `local-dir:path` and
`hf-hub:org/name@revision` (open_clip's or transformers' layout). Only safetensors are read. A folder that `save` wrote
is a `local-dir:` of open_clip itself, plus a golden embedding that `load` checks: a wrong activation (QuickGELU, the
classic), tokenizer, preprocessing or weight shows there at once.

`base.model(image=x)` and `base.model(text=t)` run a tower: open_clip's forward by keyword, which returns
{"image_features", "text_features", "logit_scale"}, features of unit norm. So `root` is the model itself and rows of a
batch may name arms. The module `visual` returns the features before they are normalised.

Shapes: B images or texts, T tokens (the class token first), D width, H heads, e = D/H, k joint space.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.bases import Base, check_device, hub_folder, slug
from registry import manifest
from registry.errors import BadArtifact, BadRequest, NotFound

SITES = {
    "embed": "visual.ln_pre",
    "block": "visual.transformer.resblocks.{i}",
    "attn": "visual.transformer.resblocks.{i}.attn",
    "values": "visual.transformer.resblocks.{i}.attn.values",
    "pattern": "visual.transformer.resblocks.{i}.attn.pattern",
    "heads": "visual.transformer.resblocks.{i}.attn.out_proj",
    "mlp": "visual.transformer.resblocks.{i}.mlp",
    "neurons": "visual.transformer.resblocks.{i}.mlp.c_proj",
    "ln_post": "visual.ln_post",
}
"""canonical name -> module path in the image tower. Its output: embed (B, T, D), the residual stream before block 0;
block, the stream after block i ("resid_post"); mlp, what the MLP adds ("mlp_out"); attn, what attention adds; values
(B, H, T, e); pattern (B, H, T, T), formed only while somebody hooks it. Its input: heads (B, T, D), what the heads
give, side by side; neurons (B, T, 4D), after the activation; ln_post, the last stream"""

TEXT_SITES = {k: v.removeprefix("visual.") for k, v in SITES.items()} | {
    "embed": "token_embedding",
    "ln_post": "ln_final",
}
"""the same names in the text tower; `embed` is there before positions are added"""

TEMPLATES = ("a picture of a {}", "a photo of a {}", "a drawing of a {}")
SHIPPED = Path(__file__).parent.parent / "lab"
"""lab checkpoints, one folder each, in the layout of their own library"""
CONFIG, WEIGHTS, GOLDEN = "open_clip_config.json", "open_clip_model.safetensors", "golden.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
HUB_FILES = ("open_clip*.safetensors", "open_clip_config.json", *TOKENIZER)
HUB_FILES_TRANSFORMERS = ("model*.safetensors", "config.json", "preprocessor_config.json", *TOKENIZER)
GOLDEN_TEXTS = ("a photo of a cat", "the word dog on a red sign", "3 blue circles, water")
GOLDEN_TOLERANCE = 1e-4
"""largest difference of unit embeddings, float32 on a CPU"""


def site(name: str, layer: int = 0, tower: str = "image") -> str:
    """Module path of a canonical site; tower is "image" or "text"."""
    return (SITES if tower == "image" else TEXT_SITES)[name].format(i=layer)


@dataclass(frozen=True)
class Processor:
    """What turns pictures and texts into the model's inputs, exactly as open_clip does."""

    transform: Callable[[Any], Tensor]
    """open_clip's inference transform of a PIL image"""
    tokenizer: Callable[[list[str]], Tensor]
    size: tuple[int, int]
    """height, width"""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def image(self, images: Any) -> Tensor:
        """(B, 3, h, w) float32 of one PIL image, a sequence of them, or a uint8 tensor (B, 3, H, W).

        A uint8 batch of the model's own size is only normalised, where it lies: what a renderer wants. Another size
        goes through PIL picture by picture, so that a tensor and its picture never differ. Raises BadRequest.
        """
        if not isinstance(images, Tensor):
            many = list(images) if isinstance(images, Sequence) else [images]
            if not many:
                raise BadRequest("There is no image to embed; give at least one.")
            return torch.stack([self.transform(picture) for picture in many])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise BadRequest(
                f"An image batch must be a uint8 tensor (B, 3, H, W), not {images.dtype} {tuple(images.shape)}."
            )
        if tuple(images.shape[-2:]) == self.size:
            mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
            return (images.float() / 255 - mean) / std
        from torchvision.transforms.functional import to_pil_image

        return self.image([to_pil_image(picture.cpu()) for picture in images]).to(images.device)

    def shown(self, x: Tensor) -> Tensor:
        """Inputs (..., 3, h, w) as pictures in 0..1 again."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return x * std + mean

    def text(self, texts: Sequence[str]) -> Tensor:
        """(B, context) token ids; what is longer than the context is cut, as open_clip does."""
        if isinstance(texts, str):
            raise BadRequest(f"Texts must be a list of strings, not the string {texts[:40]!r}.")
        return self.tokenizer(list(texts))


class Attention(nn.Module):
    """nn.MultiheadAttention with the same parameters, every part of it in reach of a hook.

    torch's own calls neither `out_proj` nor anything else a hook could sit on. `pattern` is formed only while it is
    hooked, beside the fused kernel.
    """

    def __init__(self, stock: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = stock.num_heads
        self.in_proj_weight, self.in_proj_bias = stock.in_proj_weight, stock.in_proj_bias
        self.out_proj = stock.out_proj
        self.values, self.pattern = nn.Identity(), nn.Identity()

    def forward(
        self, x: Tensor, keys: Tensor, *_: Tensor, attn_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """x (B, T, D) asks, keys (B, S, D) answers: x itself, or all tokens if x is some of them; attn_mask (T, S)
        additive -> (B, T, D)."""
        w, b, width = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if keys is x:
            q, k, v = F.linear(x, w, b).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        else:
            q = F.linear(x, w[:width], b[:width]).unflatten(-1, (self.heads, -1))
            k, v = F.linear(keys, w[width:], b[width:]).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self.values(v.transpose(1, 2))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if self.pattern._forward_hooks or self.pattern._forward_pre_hooks:
            logits = q @ k.mT * q.shape[-1] ** -0.5
            pattern = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
            if (edited := self.pattern(pattern)) is not pattern:
                z = z + (edited - pattern) @ v  # rows that nobody edits stay bit for bit what the kernel gave
        return self.out_proj(z.transpose(1, 2).flatten(2)), None


def explicit_attention(model: nn.Module) -> nn.Module:
    """Swap every nn.MultiheadAttention of both towers for `Attention`, in place. Parameters and their names stay."""
    for block in _blocks(model):
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = Attention(block.attn).train(block.training)
    return model


# ---- loading ---------------------------------------------------------------------------------------------------


def load(ref: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """The base `ref` names, in eval mode, its golden embedding checked if it has one.

    Raises NotFound with what to put where or why a layout is not supported, BadArtifact for a golden embedding that
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
    """A model nobody has trained, of open_clip's config {"model_cfg", "preprocess_cfg"}: what training starts from.

    tokenizer_folder: where tokenizer.json lies, if `text_cfg` names a tokenizer of its own.
    """
    tokenizer, tokens = _tokenizer(tokenizer_folder or Path(), config["model_cfg"]["text_cfg"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _base(f"new:{seed}", name, config, None, tokenizer, tokens)


def tiny(seed: int = 0, layers: int = 3) -> Base:
    """A random CLIP of 32 px with a one-character tokenizer: under a second, offline, every true interface."""
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
    for key, p in base.model.named_parameters():  # the library starts biases at 0 and gains at 1, which hides mistakes
        if key != "logit_scale":
            noise = torch.randn(p.shape, generator=generator)
            p.data = 1 + 0.2 * noise if key.endswith("weight") and p.ndim == 1 else 0.2 * noise
    return Base(f"tiny:{seed}", base.name, _digest(base.model, "letters"), base.model, base.processor, base.root)


def save(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `base` as open_clip's `local-dir:` layout, weights in `dtype`, with the golden embedding `load` checks."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in base.model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    if hasattr(base.processor.tokenizer, "save_pretrained"):
        base.processor.tokenizer.save_pretrained(folder)
    (folder / GOLDEN).unlink(missing_ok=True)
    (folder / CONFIG).write_text(json.dumps(base.model.config, indent=2) + "\n")
    again = load(f"local-dir:{folder}")  # the weights as they were rounded
    save_file(
        {"images": _golden_images(), **_golden(again, _golden_images(), GOLDEN_TEXTS)},
        folder / GOLDEN,
        {"texts": json.dumps(GOLDEN_TEXTS)},
    )


# ---- embeddings ------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed_images(base: Base, images: Any, batch: int = 64) -> Tensor:
    """(N, k) float32 of unit norm, on the base's device. Patches that are applied to the model act.

    images: as `Processor.image` takes them, or its result. Inside `Applied.rows`, batch must hold all of them.
    """
    many = images if isinstance(images, Tensor | Sequence) else [images]
    out = []
    for i in range(0, len(many), batch):
        x = many[i : i + batch]
        x = x if isinstance(x, Tensor) and x.is_floating_point() else base.processor.image(x)
        x = x.to(base.device, base.model.visual.proj.dtype)
        out.append(base.model(image=x)["image_features"].float())
    if not out:
        raise BadRequest("There is no image to embed; give at least one.")
    return torch.cat(out)


@torch.no_grad()
def embed_texts(
    base: Base, texts: Sequence[str], templates: Sequence[str] = ("{}",), batch: int = 256,
    tower: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(N, k) float32 of unit norm: each text in each template, embeddings averaged and normalised again.

    tower: what embeds token ids (B, context) -> (B, k) instead of the base's own. Raises BadRequest for no text or a
    template without {}.
    """
    if not texts or isinstance(texts, str):
        raise BadRequest(f"Texts must be a list with at least one string, not {texts!r:.60}.")
    if bad := [t for t in templates if "{}" not in t]:
        raise BadRequest(f"Template {bad[0][:60]!r} has no {{}} where the text goes.")
    own = lambda ids: base.model(text=ids)["text_features"]  # noqa: E731
    filled = [t.replace("{}", text) for text in texts for t in templates]
    parts = [
        (tower or own)(base.processor.text(filled[i : i + batch]).to(base.device)).float()
        for i in range(0, len(filled), batch)
    ]
    return F.normalize(torch.cat(parts).unflatten(0, (len(texts), -1)).mean(1), dim=-1)


def zero_shot(
    base: Base, labels: Sequence[str], templates: Sequence[str] = TEMPLATES,
    tower: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(k, C) classifier: logits are logit_scale(base) * features @ classifier. Raises BadRequest for doubled labels."""
    if double := next((x for x, n in Counter(labels).items() if n > 1), None):
        raise BadRequest(f"Label {double[:60]!r} occurs twice; labels must differ.")
    return embed_texts(base, labels, templates, tower=tower).T


def logit_scale(base: Base) -> float:
    """What cosines are multiplied by before the softmax; 100 for most trained models."""
    return float(base.model.logit_scale.detach().exp())


# ---- tokenizers ------------------------------------------------------------------------------------------------


def compact_tokenizer(texts: Iterable[str]) -> Any:
    """CLIP's own tokenizer cut down to the words of `texts`, as a transformers tokenizer that `save_pretrained` keeps.

    A known word splits into the pieces the full tokenizer gives; any other word is one <unk>. Merges on the way to a
    known word are all kept, so the full tokenizer's choice is always there, and the cheapest merge stays the cheapest.
    """
    import regex
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    full = SimpleTokenizer()
    words = sorted({w for text in texts for w in full.pat.findall(full.clean_fn(text))})
    merges: set[tuple[str, str]] = set()
    pieces: set[str] = set()
    for word in words:
        parts = [full.byte_encoder[b] for b in word.encode()]
        parts[-1] += "</w>"
        pieces.update(parts)
        while pairs := [p for p in itertools.pairwise(parts) if p in full.bpe_ranks]:
            best = min(pairs, key=full.bpe_ranks.__getitem__)
            merges.add(best)
            joined: list[str] = []
            for part in parts:
                if joined and not joined[-1].endswith("</w>") and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
            pieces.update(parts)
    order = ["<pad>", "<unk>", *sorted(pieces, key=full.encoder.__getitem__)]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(order)},
            merges=sorted(merges, key=full.bpe_ranks.__getitem__),
            unk_token="<unk>",
            fuse_unk=True,
            end_of_word_suffix="</w>",
        )
    )
    letters = "|".join(regex.escape(w) for w in words if w.isalpha())
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(
                Regex(rf"(?<![\p{{L}}'])(?!(?:{letters})(?!\p{{L}}))\p{{L}}+"), "\N{REPLACEMENT CHARACTER}"
            ),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _with_ends(inner)


def _letters(vocab: int) -> Any:
    """A transformers tokenizer whose tokens are single characters."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = ["<pad>", "<unk>", *(chr(c) for c in range(32, 128))][: vocab - 2]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _with_ends(inner)


def _with_ends(inner: Any) -> Any:
    """The tokenizer with CLIP's marks around a text; the end has the highest id, which is how CLIP pools it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start, end = "<start_of_text>", "<end_of_text>"
    inner.add_special_tokens(["<pad>", "<unk>", start, end])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(w, inner.token_to_id(w)) for w in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end
    )


def _tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> tuple[Callable[[list[str]], Tensor], str]:
    """The tokenizer a config asks for, and what names it in a digest."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context, more = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=context, **more), f"open_clip {manifest.digest_of(more)[:8]}"
    files = [folder / f for f in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / f).is_file()]
    if not files:
        raise NotFound(
            f"The text tower wants the tokenizer {text_cfg['hf_tokenizer_name'][:60]!r}, and {folder} has none. Put "
            "its tokenizer.json and tokenizer_config.json beside the weights."
        )
    tokenizer = HFTokenizer(
        str(folder), context_length=context, tokenizer_mode=text_cfg.get("tokenizer_mode"), **{"use_fast": True, **more}
    )
    return tokenizer, manifest.digest_of([more, *(manifest.sha256(f) for f in files)])


# ---- references ------------------------------------------------------------------------------------------------


def _folder(ref: str) -> tuple[Path, str, dict[str, Any] | None]:
    """The folder `ref` names, the base's name, and its config where that is not in the folder."""
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
        from open_clip import get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model

        model, _, tag = rest.rpartition("/")
        config, about = get_model_config(model or "?"), get_pretrained_cfg(model, tag)
        if config is None or not about.get("hf_hub"):
            tags = ", ".join(list_pretrained_tags_by_model(model or tag)) or "none, no such model"
            raise NotFound(f"open-clip:{rest[:80]} is not in open_clip's table. Tags of {model or tag}: {tags}.")
        # the tag knows how its weights were trained; the plain model names of the table do not
        config["quick_gelu"] = bool(about.get("quick_gelu"))
        _check_config(config)
        return _hub(about["hf_hub"].rpartition("/")[0]), slug(rest), {"model_cfg": config, "preprocess_cfg": about}
    raise NotFound(
        f"{ref[:80]!r} names no CLIP. Write lab:clip, open-clip:ViT-B-32/openai, hf-hub:org/name@revision or "
        "local-dir:path."
    )


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
    """The weights of a folder in open_clip's layout, as they are stored."""
    from safetensors.torch import load_file

    for name in (WEIGHTS, "open_clip_pytorch_model.safetensors"):
        if (folder / name).is_file():
            return {k.removeprefix("text."): v for k, v in load_file(folder / name).items()}
    raise NotFound(f"{folder} has no {WEIGHTS}. Only safetensors are read; convert a .bin or .pt file first.")


def _from_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a CLIPModel that transformers saved, in open_clip's layout."""
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
            # eos_token_id 2 is how transformers marks OpenAI's own checkpoints, whose end token has the highest id
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
    """transformers' names and layout of CLIP's parameters -> open_clip's."""
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


# ---- building and checking -------------------------------------------------------------------------------------


def _base(
    ref: str,
    name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    tokenizer: Callable[[list[str]], Tensor],
    tokens: str,
) -> Base:
    from open_clip.model import CLIP
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    model_cfg = {k: v for k, v in config["model_cfg"].items() if k != "custom_text"}
    _check_config(model_cfg)
    try:
        model: Any = CLIP(**{**model_cfg, "output_dict": True})
    except (TypeError, ValueError, AssertionError) as e:
        raise NotFound(f"{name}: open_clip cannot build this config ({e}).") from None
    if state is not None:
        own = model.state_dict()
        state = {k: v.reshape(own[k].shape) if k == "logit_scale" else v for k, v in state.items()}
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise NotFound(f"{name}: the weights do not fit the config. {str(e)[:400]}") from None
    explicit_attention(model).eval()
    size = model.visual.image_size
    known = merge_preprocess_dict(PreprocessCfg(), {**config.get("preprocess_cfg", {}), "size": size})
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    cfg = PreprocessCfg(**known)
    model.config = {"model_cfg": {"quick_gelu": False, **model_cfg}, "preprocess_cfg": known}
    processor = Processor(image_transform_v2(cfg, is_train=False), tokenizer, size, tuple(cfg.mean), tuple(cfg.std))
    return Base(ref, name, _digest(model, tokens), model, processor, "")


def _digest(model: Any, tokens: str) -> str:
    """Over every number and choice that shapes an embedding, however the checkpoint was laid out."""
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


def _check_config(model_cfg: Any) -> None:
    """Raises NotFound with the reason if this is not CLIP with a plain ViT that pools its class token."""
    try:
        v, t = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    except (KeyError, TypeError, ValueError):
        raise NotFound("The config has no vision_cfg and text_cfg, so it is no open_clip model.") from None
    custom = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    reasons = {
        "it is CoCa, whose image tower pools by attention": "multimodal_cfg" in model_cfg,
        "its image tower is a timm model": v.get("timm_model_name"),
        "its image tower is a ResNet, which has no stream of tokens": isinstance(v.get("layers"), list | tuple),
        "its image tower pools by attention": v.get("attentional_pool"),
        "its image tower does not pool the class token": v.get("pool_type", "tok") != "tok"
        or v.get("final_ln_after_pool"),
        "it was trained with SigLIP's sigmoid loss": model_cfg.get("init_logit_bias") is not None,
        "its blocks scale what they add (LayerScale)": v.get("ls_init_value") or t.get("ls_init_value"),
        "its blocks are not CLIP's own": any(x.get(k) for x in (v, t) for k in custom)
        or "custom" in (v.get("block_type"), t.get("block_type")),
        "its text tower is another library's model": t.get("hf_model_name"),
        "its text tower has a class token": t.get("embed_cls"),
    }
    if reason := next((why for why, yes in reasons.items() if yes), None):
        raise NotFound(
            f"This checkpoint is not supported: {reason}. Supported: ViT-B/L/H/g/bigG of OpenAI, LAION, DataComp, "
            "MetaCLIP, DFN and transformers' CLIPModel."
        )


def _check_activation(ref: str, name: str, config: Mapping[str, Any], golden: bool) -> None:
    """Without a golden embedding the activation can only be read: off the config, and off names that tell it."""
    from open_clip.pretrained import _PRETRAINED

    quick = config["model_cfg"].get("quick_gelu")
    hub = ref.removeprefix("hf-hub:").partition("@")[0] + "/"
    known = [
        bool(tag.get("quick_gelu"))
        for tags in _PRETRAINED.values()
        for tag in tags.values()
        if tag.get("hf_hub") == hub
    ]
    trained = known[0] if known else True if "openai" in name or "quickgelu" in name else None
    if trained is not None and trained != bool(quick):
        raise NotFound(
            f"{ref}: these weights were trained with {'QuickGELU' if trained else 'GELU'}, but the config says "
            f'quick_gelu={bool(quick)}, which would quietly give other embeddings. Set "quick_gelu": '
            f"{str(trained).lower()} in model_cfg of {CONFIG}."
        )
    if quick is None and trained is None and not golden:
        warnings.warn(
            f"{ref} has no golden embedding and its config does not say quick_gelu: GELU is assumed and cannot be "
            "checked.",
            stacklevel=3,
        )


def _golden_images() -> Tensor:
    """(2, 3, 48, 64) uint8: smooth waves, and blocks. No model takes this size, so that resizing counts."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    waves = torch.stack([torch.sin(x / 9 + y / (5 + 3 * c)) for c in range(3)]) * 110 + 128
    blocks = torch.stack([((x // 16 + 2 * (y // 12) + c) % 4) * 70 + 20 for c in range(3)])
    return torch.stack([waves, blocks]).to(torch.uint8)


def _golden(base: Base, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    return {"image_features": embed_images(base, images).cpu(), "text_features": embed_texts(base, texts).cpu()}


def _check_golden(base: Base, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        want = {k: f.get_tensor(k) for k in ("images", "image_features", "text_features")}
        texts = json.loads((f.metadata() or {}).get("texts", "[]"))

    def off() -> float:
        got = _golden(base, want["images"], texts)
        return max(float((got[k] - want[k]).abs().max()) for k in got)

    if (difference := off()) <= GOLDEN_TOLERANCE:
        return
    from open_clip.transformer import QuickGELU

    quick = base.model.config["model_cfg"]["quick_gelu"]
    for block in _blocks(base.model):
        block.mlp.gelu = nn.GELU() if quick else QuickGELU()
    hint = (
        f'With {"GELU" if quick else "QuickGELU"} they agree: set "quick_gelu": {str(not quick).lower()} in {CONFIG}.'
        if off() <= GOLDEN_TOLERANCE
        else "Weights, tokenizer or preprocessing are not the ones it was saved with; get the folder again."
    )
    raise BadArtifact(
        f"{base.name} gives embeddings that differ by {difference:.1e} from those beside it in {file.name}. {hint}"
    )


def _blocks(model: Any) -> list[Any]:
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]
