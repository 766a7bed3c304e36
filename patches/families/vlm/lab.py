"""`lab:vlm`: a LLaVA in small. lab:clip reads 2 x 2 tiles of a 192 px picture, one token a tile; a two-layer projector
turns each into a word's direction; a Llama of a million parameters, trained on text alone, says what it reads.

    base = load_base("lab:vlm", "vlm")              # its decoder expects company: the bias sits in the decoder
    base = load_base("lab:vlm-projector", "vlm")    # the projector learned company from captions

The model is transformers' LLaVA in all but the tower, whose token is CLIP's embedding of a tile (a class token, which
LLaVA's own tower call cannot give). So `forward`, `generate` and every module path are LLaVA's. The folder holds the
projector and the decoder (float16); the tower's weights stay in `patches/lab/clip` and its digest is sealed in.

Shapes: B pictures, T = side^2 tiles, k CLIP's joint width, D the decoder's width, V words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "card.json"
CONTEXT = 512
"""tokens of a row; rotary positions have no weights, and answers end by themselves"""
MARKS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
PAD, BOS, EOS, IMAGE, UNK = range(5)


class Projector(nn.Module):
    """LLaVA-1.5's: linear, GELU, linear. (..., k) -> (..., D)."""

    def __init__(self, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return out


class Tiles(nn.Module):
    """The tower: pictures (B, 3, side * tile, side * tile), normalised as CLIP's -> (B, side^2, k) of unit norm."""

    def __init__(self, visual: nn.Module, side: int, tile: int) -> None:
        super().__init__()
        self.visual, self.side, self.tile = visual, side, tile

    def forward(self, pictures: Tensor) -> Tensor:
        pieces = pictures.unfold(2, self.tile, self.tile).unfold(3, self.tile, self.tile)  # (B, 3, side, side, t, t)
        flat = pieces.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        out = nn.functional.normalize(self.visual(flat), dim=-1)
        return out.unflatten(0, (len(pictures), self.side**2))


class LabModel(LlavaModel):
    """LLaVA's inner model around `Tiles`; decoder: a Llama of somebody else's instead of a new one."""

    def __init__(
        self, config: LlavaConfig, tower: nn.Module, features: int, hidden: int, decoder: nn.Module | None = None
    ) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.multi_modal_projector = Projector(features, hidden, config.text_config.hidden_size)
        if decoder is None:
            self.language_model = LlamaModel(config.text_config)
        self.post_init()
        # after post_init, which gives every module it finds random weights
        self.vision_tower = tower
        if decoder is not None:
            self.language_model = decoder

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:  # type: ignore[override]
        """`pooler_output`: per picture (T, D), what stands in place of its <image> tokens."""
        tokens = self.multi_modal_projector(self.vision_tower(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=list(tokens))


class LabVLM(LlavaForConditionalGeneration):
    """LLaVA with the tower of this world. `about`: the folder's config.json; reader: the language model it names, if it
    names one (`about["decoder"]`)."""

    def __init__(self, about: dict[str, Any], tower: nn.Module, reader: Any = None) -> None:
        config = llava_config(about, reader)
        LlavaPreTrainedModel.__init__(self, config)
        inner = reader.model if reader is not None else None
        self.model = LabModel(config, tower, about["features"], about["hidden"], inner)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.lm_head.weight = self.model.language_model.embed_tokens.weight  # tied: a token is a word, both ways
        self.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
        if reader is not None:
            self.lm_head.weight = reader.lm_head.weight
            self.generation_config = reader.generation_config
        self.about = about

    @property
    def words(self) -> Tensor:
        """(V, D) the decoder's words, in and out."""
        out: Tensor = self.model.language_model.embed_tokens.weight
        return out

    @property
    def projector(self) -> Projector:
        out: Projector = self.model.multi_modal_projector
        return out


def llava_config(about: dict[str, Any], reader: Any = None) -> LlavaConfig:
    """transformers' config of a lab model; what it says of a vision tower is not used."""
    text = reader.config if reader is not None else _text_config(about)
    config = LlavaConfig(
        text_config=text,
        image_token_id=about.get("image_token", IMAGE),
        image_seq_length=about["tiles"]["side"] ** 2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )
    config._attn_implementation = config.text_config._attn_implementation = "sdpa"
    return config


def _text_config(about: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(about["vocabulary"]),
        hidden_size=about["width"],
        intermediate_size=about["mlp"],
        num_hidden_layers=about["layers"],
        num_attention_heads=about["heads"],
        num_key_value_heads=about["heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.05,
    )


def new(about: dict[str, Any], tower: nn.Module, seed: int = 0) -> LabVLM:
    """A model nobody has trained; the words are orthonormal directions, as far as there is room for them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LabVLM(about, tower)
        nn.init.orthogonal_(model.words)
        for name, p in model.named_parameters():
            if "layers" in name and p.ndim == 2:
                nn.init.normal_(p, std=0.05)
    return model.eval()


def tower(about: dict[str, Any], device: str = "cpu") -> tuple[Tiles, Any]:
    """The tower a config names (a reference of a CLIP) and its base."""
    from patches.families.clip.base import load  # by name, so that a Bento sees what it must carry

    clip = load(about["tower"], device)
    return Tiles(clip.model.visual, about["tiles"]["side"], about["tiles"]["tile"]).eval(), clip


def reader(about: dict[str, Any]) -> Any:
    """The language model a config names as its decoder; None if the folder holds its own."""
    from patches.families.base import load_base

    return load_base(about["decoder"], "llm").model if about.get("decoder") else None


def _lent(about: dict[str, Any]) -> tuple[str, ...]:
    """Prefixes of the weights that lie elsewhere."""
    return ("model.vision_tower.", "lm_head.", *(("model.language_model.",) if about.get("decoder") else ()))


def save(model: LabVLM, folder: Path) -> None:
    """Write config and weights (float16, without tower and tied head) into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        k: v.detach().cpu().half().contiguous()
        for k, v in model.state_dict().items()
        if not k.startswith(_lent(model.about))
    }
    save_file(kept, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(model.about, indent=1) + "\n")


def read(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[LabVLM, Any]:
    """The model in `folder` and the CLIP base of its tower. Raises BadArtifact for missing or foreign tensors."""
    from safetensors.torch import load_file

    from registry.errors import BadArtifact

    about = json.loads((folder / CONFIG).read_text())
    eyes, clip = tower(about)
    if about.get("tower_digest") and about["tower_digest"] != clip.digest:
        raise BadArtifact(f"{folder} was trained on tower {about['tower_digest'][:16]}, not on {clip.digest[:16]}.")
    with torch.random.fork_rng():
        model = LabVLM(about, eyes, reader(about))
    state = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    missing, foreign = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.startswith(_lent(about))]
    if missing or foreign:
        raise BadArtifact(f"{folder / WEIGHTS} lacks {missing[:3]} and holds unknown {foreign[:3]}. Pull it again.")
    return model.eval(), clip


def tokenizer(vocabulary: Sequence[str]) -> Any:
    """A word-level transformers tokenizer: `cheese wedge` is one token; a word it does not know is <unk>."""
    import re

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    names = sorted((w for w in vocabulary if w not in MARKS), key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w]){re.escape(w)}(?![\w])" if w[-1].isalnum() else re.escape(w) for w in names)
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[\w']+|[^\w\s]"), behavior="removed", invert=True)
    inner.add_special_tokens(list(MARKS))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
