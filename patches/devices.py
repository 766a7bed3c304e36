"""A base on several devices: their names in one string, `cuda:0,cuda:1`, and a decoder's layers shared out over them.

The weights go straight to their devices by a device map of transformers; hooks move what passes between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def named(device: str) -> tuple[str, ...]:
    """Devices that a string names, with commas between them."""
    return tuple(one.strip() for one in device.split(","))


def first(device: str) -> str:
    """The first device that a string names: where a base is fed and row parameters lie."""
    return named(device)[0]


def shared_out(sizes: Sequence[float], count: int) -> list[int]:
    """Assign consecutive layers of these sizes to `count` devices, as evenly as whole layers allow: indices that never
    fall. With fewer layers than devices the last ones get none."""
    whole, before, out = sum(sizes) or 1.0, 0.0, []
    for size in sizes:
        out.append(min(count - 1, int(count * (before + size / 2) / whole)))
        before += size
    return out


def device_map(model: nn.Module, devices: Sequence[str]) -> dict[str, str]:
    """Name a device for every part of a decoder in Llama's layout; the weights may lie on `meta`.

    Embeddings come first and the output head last, unless the two are one tensor; sizes are bytes of weights.
    """
    body = model.model
    assert isinstance(body, nn.Module)

    def size(part: object) -> float:
        found = part.parameters() if isinstance(part, nn.Module) else ()
        return float(sum(p.numel() * p.element_size() for p in found))

    layers = body.layers
    assert isinstance(layers, nn.ModuleList)
    head, table = getattr(model, "lm_head", None), body.embed_tokens
    tied = isinstance(head, nn.Module) and head.weight is getattr(table, "weight", None)
    config = getattr(model, "config", None)
    tied = tied or bool(getattr(config, "tie_word_embeddings", False))
    sizes = [size(layer) for layer in layers]
    ends = [size(table), 0.0 if tied else size(head)]
    places = shared_out([ends[0], *sizes, ends[1]], len(devices))
    out = {f"model.{name}": devices[0] for name, _ in body.named_children() if name not in ("layers", "norm")}
    out |= {f"model.layers.{i}": devices[at] for i, at in enumerate(places[1:-1])}
    out["model.norm"] = devices[places[-2]]
    return out | {"lm_head": devices[0] if tied else devices[places[-1]]}


def spread(model: nn.Module, places: Mapping[str, str]) -> None:
    """Move a model's parts to their devices, and from now on whatever enters a part to that part's; what the model
    gives back lies on the first part's device. Parts that lie there already are left alone."""
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import send_to_device

    remove_hook_from_submodules(model)  # those of a library that loaded it: patches rely on the order of hooks

    def entering(device: str) -> Callable[..., Any]:
        return lambda _, args, kwargs: (
            send_to_device(args, device),
            send_to_device(kwargs, device, skip_keys=["past_key_values"]),
        )

    for name, device in places.items():
        part = model.get_submodule(name)
        part.to(device)
        part.register_forward_pre_hook(entering(device), with_kwargs=True)
    start = next(iter(places.values()))
    model.register_forward_hook(lambda _, __, out: send_to_device(out, start, skip_keys=["past_key_values"]))
