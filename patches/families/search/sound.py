"""CLAP, audio and text in one space, from transformers folders: the scorer of sounds.

References: `hf-hub:org/name@revision` (such as laion/clap-htsat-unfused), `local-dir:path`, `tiny`. A folder has the
layout ClapModel.save_pretrained and ClapProcessor.save_pretrained write: config.json, model.safetensors,
preprocessor_config.json, tokenizer.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.base import Base, check_device, hub_folder, slug
from patches.families.search.scorers import BATCH, Scorer, Target
from patches.families.search.wav import resampled
from registry import manifest
from registry.errors import ConfigError, Invalid, NotFound

FILES = ("*.safetensors", "*.json", "merges.txt")
CONTEXT = 40
"""tokens of a candidate; longer ones are cut"""


@dataclass(frozen=True)
class Ears:
    """Sounds and texts as the model takes them."""

    tokenizer: Any
    extractor: Any
    """transformers' ClapFeatureExtractor: log-mel spectrograms"""

    @property
    def rate(self) -> int:
        return int(self.extractor.sampling_rate)

    def sound(self, samples: Tensor, rate: int) -> Tensor:
        """(1, 1, frames, mels) of samples (n,): resampled, its first seconds, repeated until it is long enough."""
        at_rate = resampled(samples, rate, self.rate)[: int(self.extractor.nb_max_samples)]
        longest = int(self.extractor.nb_max_samples)  # a float where the configured seconds are one
        made = self.extractor(
            [at_rate.numpy()], sampling_rate=self.rate, return_tensors="pt", max_length=longest
        )  # fmt: skip
        features: Tensor = made["input_features"]
        return features

    def text(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """ids and mask (B, CONTEXT), always of one shape."""
        made = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=CONTEXT,
                              return_tensors="pt")  # fmt: skip
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The CLAP that `ref` names, in eval mode. Raises NotFound with what to put where, ConfigError for a dtype."""
    if dtype not in (None, torch.float32):
        raise ConfigError(f"{ref[:80]}: audio models are held in fp32 alone. Leave ?dtype= out.")
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    check_device(device)
    scheme, _, rest = ref.partition(":")
    if scheme == "hf-hub":
        folder, name = hub_folder(rest, FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    elif scheme == "local-dir":
        folder, name = Path(rest), slug(Path(rest).name)
    else:
        raise NotFound(f"{ref[:80]!r} names no audio-text model. Write hf-hub:org/name@revision or local-dir:path.")
    if missing := [f for f in ("config.json", "preprocessor_config.json") if not (folder / f).is_file()]:
        raise NotFound(f"{folder} has no {missing[0]}. Give a folder that ClapModel and ClapProcessor were saved to.")
    model = (
        ClapModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
        .to(device)
        .eval()
    )
    ears = Ears(
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        ClapFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
    )
    return base(ref, name, model, ears, folder)


def base(ref: str, name: str, model: Any, ears: Ears, folder: Path) -> Base:
    """A Base of a saved model; its digest covers every file of the folder that shapes an output."""
    kept = sorted(
        f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".txt") and f.name != manifest.NAME
    )
    digest = manifest.digest_of({f.name: manifest.sha256(f) for f in kept})
    return Base(ref, name, digest, model, ears, "", "search")


def small(
    words: Iterable[str], *, rate: int = 8000, seconds: float = 1.0, mels: int = 16, width: int = 32, seed: int = 0,
    projection: int = 64,
) -> tuple[Any, Ears]:  # fmt: skip
    """A new small CLAP whose tokenizer knows `words`, and its ears: what training starts from."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    tokenizer = word_tokenizer(words)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 4 * width, "max_position_embeddings": CONTEXT + 4, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, **quiet,
    }  # fmt: skip
    audio = {
        "window_size": 4, "num_mel_bins": mels, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4],
        "patch_embeds_hidden_size": width, "hidden_size": 2 * width, "depths": [1, 1], "num_attention_heads": [2, 4],
        "num_classes": 2, "enable_fusion": False, "aff_block_r": 2, "drop_path_rate": 0.0, **quiet,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=projection)).eval()
    extractor = ClapFeatureExtractor(
        feature_size=mels, sampling_rate=rate, hop_length=int(rate * seconds) // 64, max_length_s=seconds,
        fft_window_size=256, frequency_min=40, frequency_max=rate // 2, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip
    return model, Ears(tokenizer, extractor)


def save(model: Any, ears: Ears, folder: Path) -> None:
    """Write the hub's layout."""
    model.save_pretrained(folder)
    ears.extractor.save_pretrained(folder)
    ears.tokenizer.save_pretrained(folder)


def tiny(seed: int = 0) -> Base:
    """A random small CLAP, saved and loaded as one from the hub would be."""
    words = ("a", "sound", "of", "bell", "horn", "drum", "bird", "rain", "low", "high", "twice", "and")
    model, ears = small(words, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(model, ears, folder)
        found = load(f"local-dir:{folder}")
    return Base(f"tiny:{seed}", "tiny-clap", found.digest, found.model, found.processor, "", "search")


def word_tokenizer(words: Iterable[str]) -> Any:
    """A transformers tokenizer whose tokens are whole words, lower case; any other word is one <unk>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<unk>", "<s>", "</s>"]
    known = {w: i for i, w in enumerate([*marks, *sorted(set(words) - set(marks))])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=CONTEXT,
    )  # fmt: skip


class Clap(Scorer):
    """Cosine of a text and a sound."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    @torch.inference_mode()
    def target(self, inputs: Mapping[str, Any]) -> Target:
        """inputs: {"sound": (samples (n,), rate)}."""
        if "sound" not in inputs:
            raise Invalid(f"This scorer listens to sounds; it was given {', '.join(sorted(inputs)) or 'nothing'}.")
        samples, rate = inputs["sound"]
        features = self.base.processor.sound(samples, rate).to(self.base.device)
        return Target(_unit(self.base.model.get_audio_features(input_features=features))[0])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        padded = [*texts, *[texts[0]] * (BATCH - len(texts))]
        ids = {k: v.to(self.base.device) for k, v in self.base.processor.text(padded).items()}
        return _unit(self.base.model.get_text_features(**ids))[: len(texts)]


def _unit(out: Any) -> Tensor:
    """transformers 5.23 answers with an object, earlier ones with a tensor."""
    return F.normalize((out if isinstance(out, Tensor) else out.pooler_output).float().cpu(), dim=-1)
