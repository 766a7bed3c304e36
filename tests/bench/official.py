"""Ours beside the authors' own code, on the same weights and pictures: largest difference, and CPU seconds of each.

    python -m tests.bench.official heads CHECKOUT [PICTURES]      # of github.com/yossigandelsman/clip_text_span
    python -m tests.bench.official neurons CHECKOUT [PICTURES]    # of github.com/yossigandelsman/second_order_lens

CHECKOUT is a folder with their repository, which is imported from there as it is; einops must be installed beside what
patchbay needs. The base is `lab:clip`, built by their own model code from its config and weights. Nothing of theirs is
fetched, copied or changed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.families.base import SHIPPED, Base, load_base
from patches.families.clip.direct import Lens
from patches.families.clip.second_order import lens, look, official
from training.lab import worlds

PICTURES, LAYER = 8, 6
"""pictures of the lab's test split, and the layer whose neurons are compared: the last but one, since their code takes
seconds a head and picture"""


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and CPU seconds."""
    start = time.process_time()
    out = work()
    return out, time.process_time() - start


def theirs(checkout: Path, base: Base) -> Any:
    """The base built by their model code. Raises SystemExit naming what the checkout lacks."""
    sys.path.insert(0, str(checkout))
    try:
        made = importlib.import_module("utils.model")
    except ModuleNotFoundError as e:
        raise SystemExit(f"{checkout} cannot be imported: no module {e.name!r}. Is it the checkout's root?") from None
    about = json.loads((SHIPPED / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    parts = {}
    for name, kind in (("vision_cfg", made.CLIPVisionCfg), ("text_cfg", made.CLIPTextCfg)):
        known = kind.__dataclass_fields__
        parts[name] = kind(**{k: v for k, v in about[name].items() if k in known})
    model = made.CLIP(about["embed_dim"], quick_gelu=bool(about.get("quick_gelu")), **parts).eval()
    state = {k: v.float() for k, v in base.model.state_dict().items() if k.startswith("visual.")}
    missing, odd = model.load_state_dict(state, strict=False)
    if left := [k for k in missing if k.startswith("visual.")] + list(odd):
        raise SystemExit(f"Their model takes other weights than {base.ref} has: {', '.join(left[:5])}.")
    return model


def off(ours: Tensor, other: Tensor) -> float:
    """Largest relative difference of vectors (..., k)."""
    return float(((ours - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)).max())


@torch.no_grad()
def heads(checkout: Path, base: Base, x: Tensor) -> dict[str, Any]:
    """Direct effects of every head and MLP, LayerNorm's means shared their way."""
    model = theirs(checkout, base)
    logger = importlib.import_module("prs_hook").hook_prs_logger(model, "cpu")

    def run() -> tuple[Tensor, Tensor]:
        logger.reinit()
        y = model.encode_image(x, attn_method="head", normalize=False)
        found: tuple[Tensor, Tensor] = logger.finalize(y)
        return found

    (by_patch, by_mlp), slow = timed(run)
    at = Lens(base)
    got, fast = timed(lambda: at.read(x, share="apportioned"))
    norm = got.norm[:, None, None]
    return {
        "heads": off(got.heads / norm[..., None], by_patch.sum(2)), "mlps": off(got.mlps / norm, by_mlp),
        "CPU s, theirs": slow, "CPU s, ours": fast,
    }  # fmt: skip


@torch.no_grad()
def neurons(checkout: Path, base: Base, x: Tensor) -> dict[str, Any]:
    """Second-order effects of every neuron of one layer, as their code defines them."""
    model = theirs(checkout, base)
    hook = importlib.import_module("prs_second_order_neurons_hook")
    logger = hook.hook_prs_logger(model, LAYER, "cpu")
    blocks = model.visual.transformer.resblocks

    def run() -> Tensor:
        out = []
        for one in x:  # a picture at a time: it forms tokens x neurons x width
            logger.reinit()
            y = model.encode_image(one[None], attn_method="head", normalize=False)
            logger.finalize()
            out.append(
                sum(
                    torch.from_numpy(logger.apply_attention_head_and_project_layer_neurons(later, h, y))
                    for later in range(LAYER + 1, len(blocks))
                    for h in range(blocks[0].attn.num_heads)
                )
            )
        return torch.cat([torch.as_tensor(o) for o in out])

    want, slow = timed(run)
    at, once = timed(lambda: lens(base, LAYER, ln="official"))
    got, fast = timed(lambda: official(base, at, look(base, x, [LAYER], keep=True)))
    mean = want.mean(0, keepdim=True)
    return {
        "effects": off(got, want), "effects less their mean over pictures": off(got - got.mean(0), want - mean),
        "CPU s, theirs": slow, "CPU s, ours": fast, "CPU s, our lens, once": once,
    }  # fmt: skip


COMPARISONS = {"heads": heads, "neurons": neurons}


def main(words: list[str]) -> dict[str, Any]:
    """Run one comparison and print it."""
    if len(words) not in (2, 3) or words[0] not in COMPARISONS or not Path(words[1]).is_dir():
        raise SystemExit(__doc__)
    count = int(words[2]) if len(words) == 3 else PICTURES
    base = load_base("lab:clip", "clip")
    images = worlds.WORLDS["imagenet"]("test", count, 0).read(range(count)).image
    found = COMPARISONS[words[0]](Path(words[1]), base, base.processor.image(images))
    found |= {"n": count, "theirs / ours": found["CPU s, theirs"] / max(1e-9, found["CPU s, ours"])}
    for name, value in found.items():
        print(f"{name:40} {value:.3g}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
