"""Loads and writes video checkpoints: transformers' own layout, and beside it what transformers has no place for.

References: `lab:video-scratch`, `lab:video-natural` and others (ship here), `hf-hub:org/name@revision`,
`local-dir:path`, `untrained:videomae-base` (published sizes with drawn weights). A folder holds

| file | what |
|---|---|
| `config.json`, `model.safetensors` | transformers' VideoMAE (pre-training or classification) or Llama |
| `preprocessor_config.json` | `image_mean`, `image_std` as the hub has them; our `still` says what is taken away |
| `video.json`, `probe.safetensors` | optional: class names, and the probe of frozen features with its layer |
| `classifier/config.json`, `classifier/model.safetensors` | optional: a fine-tuned copy with its own encoder |
| `codebook.safetensors` | of Toto: the tokenizer's centres; `video.json` has its patch, shrink and frames |
| `tokenizer/` | of Toto, in place of that: a convolutional tokenizer (`convolved`) |

Only safetensors and JSON are read. Half precision on disk is widened to float32 on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patches.families.base import SHIPPED, Base, check_device, hub_folder, slug
from patches.families.video import convolved
from patches.families.video.convolved import Convolved
from patches.families.video.model import MaskedVideo, VideoModel
from patches.families.video.pixels import IMAGENET_MEAN, IMAGENET_STD, STILLS
from patches.families.video.probe import Probe
from patches.families.video.tokens import RESERVED, Codebook, TokenVideo
from patches.families.video.untrained import llama, untrained
from registry import manifest
from registry.errors import BadArtifact, ConfigError, NotFound

CONFIG, WEIGHTS, PROCESSOR, ABOUT = "config.json", "model.safetensors", "preprocessor_config.json", "video.json"
PROBE, CODEBOOK, CLASSIFIER, TOKENIZER = "probe.safetensors", "codebook.safetensors", "classifier", "tokenizer"
SEALED = "manifest.json"
HUB_FILES = (
    CONFIG, "*.safetensors", PROCESSOR, ABOUT,
    *(f"{inner}/*.{kind}" for inner in (CLASSIFIER, TOKENIZER) for kind in ("json", "safetensors")),
)  # fmt: skip
SITES = {"block": "blocks.{i}"}
TINY_CLASSES = ("still", "left", "right")


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The checkpoint `ref` names, in eval mode. Raises NotFound with what there is, BadArtifact for a broken folder,
    ConfigError for a model of tokens in half precision: its codes are distances, which that is too coarse for."""
    check_device(device)
    kind, _, which = ref.partition(":")
    if kind == "untrained":
        model = untrained(which)
        return Base(ref, slug(f"untrained-{which}"), digest_of(model), model.to(device), None, "")
    folder, name = _folder(ref)
    base = _base(folder, ref, name, device)
    if dtype is not None and dtype != torch.float32 and isinstance(base.model, TokenVideo):
        raise ConfigError(f"{name} is a video model of tokens, which is held in fp32 alone. Leave ?dtype= out.")
    base.model.to(dtype or torch.float32)
    return base


def load_folder(folder: Path, device: str = "cpu") -> Base:
    """A sealed folder's checkpoint as a base: what an arm of kind `model` is."""
    return _base(Path(folder), f"local-dir:{folder}", slug(Path(folder).name), device)


def knows(folder: Path) -> str:
    """What a folder is, if it is a video model of ours or one that transformers' VideoMAE was saved to."""
    if not (folder / CONFIG).is_file():
        return ""
    kind = str((_json(folder / CONFIG).get("architectures") or [""])[0])
    return f"a video model, {kind}" if kind.startswith("VideoMAE") or (folder / ABOUT).is_file() else ""


def tiny(seed: int = 0, kind: Literal["videomae", "toto"] = "videomae") -> Base:
    """A random small checkpoint with every interface: 4 frames of 16 px, three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: VideoModel = tiny_masked() if kind == "videomae" else tiny_tokens()
    model.eval()
    name = f"tiny-{kind}"
    return Base(f"tiny:{seed}" if kind == "videomae" else "tiny:toto", name, digest_of(model), model, None, "")


def tiny_masked() -> MaskedVideo:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    net = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=32, norm_pix_loss=False, use_mean_pooling=False,
            layer_norm_eps=1e-6, initializer_range=0.2,
        )
    )  # fmt: skip
    return MaskedVideo(net, TINY_CLASSES, _lively(Probe(16, 3)), 2, still="mean")


def tiny_tokens() -> TokenVideo:
    lm = llama(width=16, depth=2, heads=2, vocabulary=RESERVED + 12, positions=24, spread=0.2)
    codebook = Codebook(torch.randn(12, 48) * 0.3, patch=4, shrink=2, residual=True)
    return TokenVideo(lm, codebook, 4, 16, TINY_CLASSES, _lively(Probe(16, 3)), 1)


def _lively(probe: Probe) -> Probe:
    """Batch norm's moments away from 0 and 1, as after training."""
    probe.norm.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
    return probe


# ---- reading ------------------------------------------------------------------------------------------------------


def _folder(ref: str) -> tuple[Path, str]:
    kind, _, rest = ref.partition(":")
    if kind == "lab" and rest:
        folder = SHIPPED / rest
        if not rest.startswith("video-") or not (folder / CONFIG).is_file():
            there = sorted(p.parent.name for p in SHIPPED.glob(f"video-*/{CONFIG}"))
            raise NotFound(f"There is no lab:{rest[:40]}. There are: {', '.join(f'lab:{n}' for n in there) or 'none'}.")
        return folder, slug(rest)
    if kind == "hf-hub" and rest:
        return hub_folder(rest, HUB_FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    if kind == "local-dir" and rest:
        folder = Path(rest).expanduser()
        if not (folder / CONFIG).is_file():
            raise NotFound(
                f"{folder} has no {CONFIG}. Put a VideoMAE's or a Toto's files there, as the hub keeps them."
            )
        return folder, slug(folder.name)
    raise NotFound(f"{ref[:60]!r} names no video model. Write lab:video-natural, hf-hub:org/name or local-dir:path.")


def _base(folder: Path, ref: str, name: str, device: str) -> Base:
    model = read(folder)
    return Base(ref, name, _digest(folder), model.to(device).eval(), None, "")


def read(folder: Path) -> VideoModel:
    """The model in a folder, float32. Raises BadArtifact naming the file that is wrong."""
    about = _json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    config = _json(folder / CONFIG)
    kind = config.get("model_type")
    classes = tuple(about.get("classes") or _labels(config))
    probe, layer = _probe(folder, about)
    if kind == "videomae":
        how = _json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
        still = how.get("still", "keep")
        if still not in STILLS:
            raise BadArtifact(f"{folder / PROCESSOR}: still={still!r:.40} must be one of {', '.join(STILLS)}.")
        mean, std = how.get("image_mean", IMAGENET_MEAN), how.get("image_std", IMAGENET_STD)
        second = _transformers(folder / CLASSIFIER) if (folder / CLASSIFIER).is_dir() else None
        if second is not None and not about.get("classes"):
            classes = tuple(_labels(_json(folder / CLASSIFIER / CONFIG)))
        return MaskedVideo(_transformers(folder), classes, probe, layer, second, still, mean, std)
    if kind == "llama":
        lm = _transformers(folder)
        try:
            codebook = _tokenizer(folder, about)
            frames, size = about["frames"], about["size"]
        except KeyError as e:
            raise BadArtifact(f"{folder / ABOUT} lacks {e}.") from None
        if (count := RESERVED + len(codebook.codes)) != lm.config.vocab_size:
            raise BadArtifact(f"{folder}: its Llama has {lm.config.vocab_size} ids, its tokenizer {count}.")
        return TokenVideo(lm, codebook, frames, size, classes, probe, layer)
    raise BadArtifact(f"{folder / CONFIG}: model_type={kind!r:.40} must be videomae or llama.")


def _tokenizer(folder: Path, about: Mapping[str, Any]) -> Codebook | Convolved:
    """A Toto's tokenizer. Raises KeyError for what `about` lacks."""
    if (folder / TOKENIZER).is_dir():
        return convolved.read(folder / TOKENIZER)
    if not (folder / CODEBOOK).is_file():
        raise BadArtifact(f"{folder} has a Llama and no {CODEBOOK}: without a tokenizer it reads no clips.")
    shape = about["codebook"]
    return Codebook(_tensors(folder / CODEBOOK)["codes"], shape["patch"], shape["shrink"], shape["residual"])


def _transformers(folder: Path) -> Any:
    """A transformers model by its config's architecture, every weight accounted for."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        VideoMAEConfig,
        VideoMAEForPreTraining,
        VideoMAEForVideoClassification,
    )

    about = _json(folder / CONFIG)
    known: dict[str, tuple[Any, Any]] = {
        "VideoMAEForPreTraining": (VideoMAEForPreTraining, VideoMAEConfig),
        "VideoMAEForVideoClassification": (VideoMAEForVideoClassification, VideoMAEConfig),
        "LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig),
    }
    name = (about.get("architectures") or ["VideoMAEForPreTraining"])[0]
    if name not in known:
        raise BadArtifact(f"{folder / CONFIG}: architecture {name!r:.60} must be one of {', '.join(known)}.")
    cls, config_cls = known[name]
    config = config_cls.from_dict(about)
    config._attn_implementation = "sdpa"
    net = cls(config)
    held = {k: v.float() for part in sorted(folder.glob("model*.safetensors")) for k, v in _tensors(part).items()}
    missing, over = net.load_state_dict(held, strict=False)
    missing = [k for k in missing if not (getattr(config, "tie_word_embeddings", False) and k == "lm_head.weight")]
    # checkpoints before transformers 5 keep the query's and value's biases apart, and the key's, which is zero
    if missing or over:
        net.load_state_dict(_renamed(held, folder), strict=True)
    net.tie_weights()
    return net


def _renamed(held: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Weights of older releases under today's names. Raises BadArtifact for what nobody knows."""
    out = {}
    for k, v in held.items():
        name = k.replace("attention.attention.q_bias", "attention.attention.query.bias")
        out[name.replace("attention.attention.v_bias", "attention.attention.value.bias")] = v
    if out.keys() == held.keys():
        raise BadArtifact(f"{folder}: its weights are not those of its config. Take both files of one checkpoint.")
    return out


def _probe(folder: Path, about: Mapping[str, Any]) -> tuple[Probe | None, int]:
    if not (folder / PROBE).is_file():
        return None, 0
    held = _tensors(folder / PROBE)
    try:
        how = about["probe"]
        width = len(held["norm.running_mean"])
        made = Probe(width, len(held["out.bias"]), how["pooling"], len(held["query"]) if "query" in held else 1)
        made.load_state_dict({k: v if v.dtype == torch.int64 else v.float() for k, v in held.items()})
        return made.eval(), int(how["layer"])
    except (KeyError, RuntimeError) as e:
        raise BadArtifact(f"{folder / PROBE} does not fit {ABOUT}: {str(e)[:120]}.") from None


def _labels(config: Mapping[str, Any]) -> list[str]:
    """Class names of a hub config, if somebody named them."""
    names = {int(k): str(v) for k, v in (config.get("id2label") or {}).items()}
    return (
        [names[i] for i in sorted(names)]
        if "VideoMAEForVideoClassification" in str(config.get("architectures"))
        else []
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise BadArtifact(f"{file} cannot be read: {str(e)[:120]}.") from None
    if not isinstance(about, dict):
        raise BadArtifact(f"{file} must hold an object.")
    return about


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise BadArtifact(f"{file} is no safetensors file: {str(e)[:120]}.") from None


def _digest(folder: Path) -> str:
    """Over every file that shapes an answer, as it lies."""
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*")
        if (p.suffix in (".safetensors", ".json") and p.name != SEALED and p.name in (CONFIG, PROCESSOR, ABOUT))
        or p.suffix == ".safetensors"
    )  # fmt: skip
    return manifest.digest_of({name: manifest.sha256(folder / name) for name in names})


def digest_of(model: nn.Module) -> str:
    """A digest of a model that lies in no file."""
    return manifest.digest_of(
        {k: [list(v.shape), hashlib.sha256(v.detach().cpu().contiguous().numpy().tobytes()).hexdigest()]
         for k, v in model.state_dict().items()}
    )  # fmt: skip


# ---- writing ------------------------------------------------------------------------------------------------------


def save(model: VideoModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model in the layout `read` takes; dtype: of the weights on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"classes": list(model.classes)}
    if model.probe is not None:
        about["probe"] = {"layer": model.probe_layer, "pooling": model.probe.pooling}
        save_file({k: v.contiguous() for k, v in model.probe.state_dict().items()}, folder / PROBE)
    if isinstance(model, MaskedVideo):
        _write(model.net, folder, dtype)
        if model.classifier is not None and model.classifier is not model.net:
            _write(model.classifier, folder / CLASSIFIER, dtype)
        how = {
            "image_processor_type": "VideoMAEImageProcessor", "do_rescale": True, "do_normalize": True,
            "rescale_factor": 1 / 255, "image_mean": list(model.mean), "image_std": list(model.std),
            "size": {"shortest_edge": model.size}, "crop_size": {"height": model.size, "width": model.size},
            "still": model.still,
        }  # fmt: skip
        (folder / PROCESSOR).write_text(json.dumps(how, indent=1) + "\n")
    elif isinstance(model, TokenVideo):
        _write(model.lm, folder, dtype)
        book = model.codebook
        about |= {"frames": model.frames, "size": model.size}
        if isinstance(book, Convolved):
            convolved.save(book, folder / TOKENIZER)
        else:
            save_file({"codes": book.codes.to(dtype).contiguous()}, folder / CODEBOOK)
            about["codebook"] = {"patch": book.patch, "shrink": book.shrink, "residual": book.residual}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def _write(net: Any, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads(net.config.to_json_string(use_diff=False))
    about["architectures"] = [type(net).__name__]
    about.pop("transformers_version", None)
    about.pop("_name_or_path", None)
    (folder / CONFIG).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    held = {k: v.detach().cpu().to(dtype).contiguous() for k, v in net.state_dict().items()}
    if getattr(net.config, "tie_word_embeddings", False):
        held.pop("lm_head.weight", None)
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})


__all__: Sequence[str] = ("SITES", "load", "load_folder", "read", "save", "tiny")
