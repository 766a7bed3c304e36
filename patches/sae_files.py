"""Dictionaries as files: SAELens' layout, in which ours are written, Prisma's, and Gemma Scope's arrays; read without
pickle, and whatever is wrong with them said in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patches.checkpoints import check_fetched, check_whole, json_object, reading
from patches.mechanisms.features import SAE, Activation, Normalise
from registry.errors import BadArtifact, NotFound

WEIGHTS, ABOUT, SCOPE = "sae_weights.safetensors", "cfg.json", "params.npz"
"""SAELens' two files, and Gemma Scope's one"""
MAX_NUMBERS = 1 << 31
"""in one dictionary; the largest published for CLIP has 2 * 49,152 * 768 = 75 million"""
_NORMALISE: dict[str, Normalise] = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "norm"}
_ARCHITECTURE: dict[Activation, str] = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}


def save_sae(sae: SAE, folder: Path) -> None:
    """Write `sae` in SAELens' layout: cfg.json and sae_weights.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"W_enc": sae.encoder.T, "b_enc": sae.bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    F, D = sae.decoder.shape
    about: dict[str, Any] = {
        "architecture": _ARCHITECTURE[sae.activation],
        "d_in": D,
        "d_sae": F,
        "dtype": str(sae.decoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": next(k for k, v in _NORMALISE.items() if v == sae.normalise),
        "reshape_activations": "none",
        "metadata": {"hook_name": sae.site},
    }
    if sae.activation == "topk":
        about |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    (folder / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True))


def load_sae(folder: Path | str, device: str = "cpu") -> SAE:
    """A dictionary in SAELens' layout (cfg.json, sae_weights.safetensors), of any of its versions, or Prisma's config
    beside safetensors, or Gemma Scope's params.npz. Raises NotFound naming the missing file, BadArtifact for an
    architecture that is not covered, for weights that are cut off or not finite.
    """
    folder = Path(folder)
    if (folder / SCOPE).is_file() and not (folder / WEIGHTS).is_file():
        return _scope(folder).to(device)
    about = next((folder / n for n in (ABOUT, "config.json") if (folder / n).is_file()), None)
    weights = next((folder / n for n in (WEIGHTS, "weights.safetensors") if (folder / n).is_file()), None)
    if weights is None and any(folder.glob("*.pt")):
        raise NotFound(f"{folder} holds a pickle (.pt) and no safetensors. Convert it once with `convert_sae`.")
    if about is None or weights is None:
        deeper = sorted(f.parent for name in (WEIGHTS, SCOPE) for f in folder.glob(f"**/{name}"))
        hint = f" There is one in {deeper[0]}." if deeper else ""
        raise NotFound(f"{folder} needs {ABOUT} (or config.json) and {WEIGHTS} to be a sparse autoencoder.{hint}")
    check_fetched(about)
    check_whole(weights)
    with reading(str(folder)):
        return _canonical(_known(json_object(about)), load_file(weights), folder).to(device)


def _scope(folder: Path) -> SAE:
    """Gemma Scope's params.npz: jumprelu, the decoder's bias not taken off; its path tells the layer."""
    file = folder / SCOPE
    check_fetched(file)
    with reading(str(file)), np.load(file, allow_pickle=False) as arrays:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(arrays[k])) for k in arrays.files}
    about: dict[str, Any] = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    if found := re.search(r"layer_(\d+)(?!.*layer_\d)", folder.resolve().as_posix()):
        about["hook_name"] = f"blocks.{found[1]}.hook_resid_post"
    return _canonical(about, tensors, folder)


def _known(about: dict[str, Any]) -> dict[str, Any]:
    """A config without what is null, and with its older booleans as the words they stand for."""
    out = {k: v for k, v in about.items() if v is not None}
    for name in ("normalize_activations", "reshape_activations"):
        if out.get(name) in (False, ""):
            out[name] = "none"
    if out.get("normalize_activations") is True:  # before it had kinds, there was this one
        out["normalize_activations"] = "constant_norm_rescale"
    return out


def convert_sae(weights: Path | str, folder: Path | str) -> SAE:
    """Prisma's or SAELens' `.pt` with its config.json beside it -> `folder` in SAELens' layout.

    Only tensors are unpickled. Raises BadArtifact for a file that holds code, NotFound without a config.
    """
    weights = Path(weights)
    about = next((weights.parent / n for n in ("config.json", ABOUT) if (weights.parent / n).is_file()), None)
    if about is None:
        raise NotFound(f"{weights} needs its config.json beside it.")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for the many ways a pickle can be wrong
        raise BadArtifact(
            f"{weights} is not a file of tensors alone, so it is not loaded ({str(e).splitlines()[0][:80]}). "
            "Use the release that keeps its config in config.json."
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BadArtifact(f"{weights} holds no dictionary of tensors.")
    sae = _canonical(_known(json_object(about)), state, weights.parent)
    save_sae(sae, Path(folder))
    return sae


def _canonical(about: dict[str, Any], t: dict[str, Tensor], where: Path) -> SAE:
    """The one form from a library's config and state: every convention it may have used is folded into the weights."""
    if missing := {"W_enc", "W_dec", "b_dec", "b_enc"} - t.keys():
        raise BadArtifact(f"{where} has no {', '.join(sorted(missing))}; a gated or other autoencoder is not covered.")
    if sum(v.numel() for v in t.values()) > MAX_NUMBERS:
        raise BadArtifact(f"{where} holds more than {MAX_NUMBERS} numbers; no dictionary does.")
    act = str(about.get("activation_fn", about.get("activation_fn_str", "relu")))
    name = str(about.get("architecture", "standard"))
    if name == "standard" and act == "topk":
        name = "topk"
    activation = next((a for a, n in _ARCHITECTURE.items() if n == name), None)
    if activation is None or (name == "standard" and act != "relu") or about.get("is_transcoder"):
        raise BadArtifact(f"{where} is {name!r} with {act!r}; covered are {', '.join(_ARCHITECTURE.values())}.")
    how = about.get("normalize_activations", "none")
    if not isinstance(how, str) or how not in _NORMALISE:
        raise BadArtifact(f"{where} has normalize_activations={how!r}; fold its factor into the weights first.")
    if about.get("finetuning_scaling_factor") or about.get("reshape_activations", "none") not in ("none", None):
        raise BadArtifact(f"{where} rescales or reshapes its input, which is not covered.")
    kwargs = about.get("activation_fn_kwargs") or {}
    k = int(about.get("k", kwargs.get("k", 0))) if activation == "topk" else 0
    if bad := sorted(n for n, v in t.items() if v.is_floating_point() and not bool(v.isfinite().all())):
        raise BadArtifact(f"{where}: {bad[0]} holds NaN or infinity. Get the dictionary again.")
    W = {n: t[n].float() for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if [W["W_enc"].ndim, W["W_dec"].ndim] != [2, 2] or W["W_enc"].T.shape != W["W_dec"].shape:
        raise BadArtifact(f"{where}: W_enc {list(W['W_enc'].shape)} is not W_dec {list(W['W_dec'].shape)} transposed.")
    encoder, bias, decoder = W["W_enc"].T, W["b_enc"], W["W_dec"]
    if about.get("apply_b_dec_to_input", True):
        bias = bias - encoder @ W["b_dec"]
    if about.get("rescale_acts_by_decoder_norm"):
        norm = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm[:, None]
    threshold = None
    if activation == "jumprelu":
        threshold = t["threshold"] if "threshold" in t else t["log_threshold"].exp() if "log_threshold" in t else None
        threshold = threshold.float().relu() if threshold is not None else None
    meta = about.get("metadata") if isinstance(about.get("metadata"), dict) else {}
    site = str(next((d[n] for d in (meta, about) for n in ("hook_name", "hook_point") if d and d.get(n)), ""))
    return SAE(
        encoder.contiguous(), bias, decoder.contiguous(), W["b_dec"], activation, k, threshold, _NORMALISE[how], site
    )


def hook_layer(site: str) -> tuple[int, str] | None:
    """(layer, hook) of a TransformerLens name such as "blocks.9.hook_resid_post"; None if it is none."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", site)
    return (int(found[1]), found[2]) if found else None
