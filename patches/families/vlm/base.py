"""Vision-language bases: loading by reference, the random tiny one, and the words' states that erasing needs.

References: `lab:vlm` and `lab:vlm-projector` (ship here), `hf-hub:org/name@revision` and `local-dir:path` (in
transformers' layout; safetensors alone, no remote code). Supported architectures are the rows of `layouts.LAYOUTS`.

Shapes: B rows, T tokens, D the decoder's width, L decoder layers; depth 0 is what enters the decoder (the projector's
output at image tokens), depth l the output of layer l.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patches.checkpoints import check_config, check_folder, check_loaded, check_tokenizer, json_object, reading
from patches.families.base import SHIPPED, Base, check_device, hub_folder, load_base, slug
from patches.families.llm.base import digests
from patches.families.llm.planted import weights_digest
from patches.families.llm.references import _quiet
from patches.families.vlm.layouts import image_token, layout
from patches.families.vlm.processor import ChatProcessor, LabProcessor, Processor
from registry import manifest
from registry.errors import NotFound

HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt")
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
"""model_type of a config.json -> the class that loads it"""


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The base `ref` names, in eval mode. dtype: float32 on a CPU, bfloat16 on CUDA.

    Raises NotFound with what to put where or which architectures are supported, NotReady if CUDA is missing.
    """
    check_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    folder, name = _folder(ref)
    about = json_object(folder / "config.json")
    if about.get("architecture") == "LabVLM":
        return _lab(ref, name, folder, device, dtype)
    kind = about.get("model_type", "")
    if kind not in CLASSES:
        raise NotFound(f"{folder} holds a {str(kind)[:40]!r}. Supported: {', '.join(CLASSES)}, and lab:vlm.")
    check_folder(folder)
    import transformers

    check_tokenizer(folder)
    with _quiet(), reading(str(folder)):
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, attn_implementation="sdpa", dtype=dtype,
            device_map={"": device}, output_loading_info=True,
        )  # fmt: skip
        # SmolVLM's own processor wants one more package, for videos; for pictures it is Idefics3's
        made = transformers.Idefics3Processor if kind == "smolvlm" else transformers.AutoProcessor
        hub = made.from_pretrained(folder, local_files_only=True)
    check_loaded(name, info)
    digest, former = digests(folder)
    return replace(of_hub(ref, name, digest, model, hub), former=former)


def knows(folder: Path) -> str:
    """What a folder of transformers' layout is, if it is a vision-language model that is read."""
    if not (folder / "config.json").is_file():
        return ""
    if (kind := str(json_object(folder / "config.json").get("model_type", ""))) not in CLASSES:
        return ""
    check_folder(folder)
    return f"a vision-language model of type {kind}, digest {digests(folder)[0][:16]}"


def of_hub(ref: str, name: str, digest: str, model: Any, hub: Any) -> Base:
    """A Base around a transformers model and its processor."""
    where = layout(model)
    tokenizer = hub.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor = Processor(hub, tokenizer, image_token(model), where.keys)
    return Base(ref, name, digest, model.eval(), processor, where.root, "vlm")


def _lab(ref: str, name: str, folder: Path, device: str, dtype: torch.dtype) -> Base:
    from patches.families.vlm import lab  # transformers' LLaVA; nobody else pays for its import

    model, clip = lab.read(folder)
    about = model.about
    tiles, normal = about["tiles"], (clip.processor.mean, clip.processor.std)
    parts = {f: manifest.sha256(folder / f) for f in (lab.WEIGHTS, lab.CONFIG)} | {"tower": clip.digest}
    hub: LabProcessor
    former: tuple[str, ...] = ()
    if about.get("decoder"):
        reader = load_base(about["decoder"], "llm")
        former = tuple(manifest.digest_of(parts | {"decoder": old}) for old in reader.former)
        tokenizer, parts = reader.processor, parts | {"decoder": reader.digest}
        mark = tokenizer.convert_ids_to_tokens(about["image_token"])
        hub = ChatProcessor(tokenizer, tiles["side"], tiles["tile"], *normal, mark)
    else:
        tokenizer = lab.tokenizer(about["vocabulary"])
        hub = LabProcessor(tokenizer, tiles["side"], tiles["tile"], *normal)
    processor = Processor(hub, tokenizer, image_token(model), layout("LabVLM").keys)
    digest = manifest.digest_of(parts)
    model.to(device=device, dtype=dtype)
    return Base(ref, name, digest, model.eval(), processor, layout("LabVLM").root, "vlm", former)


def tiny(seed: int = 0) -> Base:
    """A random LLaVA of 32 px and 16 image tokens with a one-character tokenizer: under a second, offline."""
    import transformers as tf

    from patches.families import llm

    inner = llm.tiny(seed, vocab=98)
    tokenizer = inner.processor
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    mark = tokenizer.convert_tokens_to_ids("<image>")
    text = inner.model.config
    text.vocab_size = len(tokenizer)
    vision = tf.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=mark, vision_feature_layer=-1, image_seq_length=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.LlavaForConditionalGeneration(config).eval()
        for p in model.parameters():  # the library's small start hides mistakes
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.2)
    square = {"height": 32, "width": 32}
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    hub = tf.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip
    return of_hub(f"tiny:{seed}", "tiny-llava", weights_digest(model), model, hub)


CHAT = (
    "{% for m in messages %}{{ m['role'][:1] + ':' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""the tiny model's chat template, with pictures as parts"""


def _folder(ref: str) -> tuple[Path, str]:
    scheme, _, rest = ref.partition(":")
    if scheme == "lab" and (SHIPPED / slug(rest) / "config.json").is_file():
        return SHIPPED / slug(rest), f"lab-{slug(rest)}"
    if scheme == "local-dir":
        check_config(Path(rest))
        return Path(rest), slug(Path(rest).resolve().name)
    if scheme == "hf-hub":
        return hub_folder(rest, HUB_FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    raise NotFound(
        f"{ref[:80]!r} names no vision-language base. Write lab:vlm, lab:vlm-projector, "
        "hf-hub:llava-hf/llava-1.5-7b-hf or local-dir:path."
    )


def parts(ref: str) -> tuple[str, ...]:
    """References of what a lab base is made with: its tower, and its decoder if that is not its own."""
    if not ref.startswith("lab:"):
        return ()
    about = json.loads((_folder(ref)[0] / "config.json").read_text())
    return tuple(about[k] for k in ("tower", "decoder") if about.get(k))


# ---- the decoder's inside -----------------------------------------------------------------------------------------


def depth(base: Base) -> int:
    """Number of decoder layers."""
    return len(base.model.get_submodule(layout(base.model).decoder).layers)


def site(base: Base, at: int) -> tuple[str, Literal["input", "output"]]:
    """Module path and side ("input" or "output") where the stream has depth `at`."""
    where = layout(base.model)
    return (where.block(0), "input") if at == 0 else (where.block(at - 1), "output")


@torch.inference_mode()
def states(base: Base, embeds: Tensor, depths: tuple[int, ...] | None = None, bent: Tensor | None = None) -> Tensor:
    """(depths, B, T, D) the stream of embeddings (B, T, D) at each depth (default: all), before any final norm.

    bent (3, B, T): rotary positions where pictures bend them (M-RoPE); by default 0, 1, ...
    No arm acts. Hooks answer to this thread only, so a worker may decode on another one meanwhile.
    """
    import threading

    where, L = layout(base.model), depth(base)
    wanted = tuple(range(L + 1)) if depths is None else depths
    got: dict[int, Tensor] = {0: embeds}
    me, inner = threading.get_ident(), base.model.get_submodule(where.decoder)

    def keep(at: int) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            if threading.get_ident() == me:
                got[at] = out[0] if isinstance(out, tuple) else out

        return hook

    B, T = embeds.shape[:2]
    positions = torch.arange(T, device=embeds.device).expand(B, -1)
    if where.positions is not None:
        positions = positions.expand(3, -1, -1) if bent is None else bent.to(embeds.device)
    hooks = [inner.layers[at - 1].register_forward_hook(keep(at)) for at in wanted if at]
    try:
        if hooks:
            # from the root, for that is where edits read their inputs; without row parameters they do nothing
            base.model.get_submodule(where.root)(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    finally:
        for h in hooks:
            h.remove()
    return torch.stack([got[at] for at in wanted])


def embeddings(base: Base, ids: Tensor) -> Tensor:
    """(..., D) input embeddings of ids."""
    out: Tensor = base.model.get_input_embeddings()(ids)
    return out


@torch.inference_mode()
def word_states(base: Base, ids: list[int], depths: tuple[int, ...] | None = None) -> Tensor:
    """(depths, T, D) states of a word's tokens when the decoder reads it alone (after BOS, if there is one)."""
    bos = base.processor.tokenizer.bos_token_id
    lead = [bos] if bos is not None else []
    row = torch.tensor([[*lead, *ids]], device=base.device)
    return states(base, embeddings(base, row), depths)[:, 0, len(lead) :]


def planted(base: Base) -> Base:
    """`base` under another name, for tests that change it."""
    return replace(base, ref="tiny:planted", name="tiny-planted", digest=weights_digest(base.model))
