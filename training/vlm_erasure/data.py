"""Captioned pictures whose objects are known: the lab's scenes, and COCO by folder and annotation file.

    scenes("lab:alone", "test", 600)                       # worlds.coco(kind="alone"), twemoji
    coco("/data/val2014", "/data/instances_val2014.json", captions="/data/captions_val2014.json", n=500)

COCO's ground truth is CHAIR's: instance labels united with what the reference captions name. The table of synonyms
(`COCO_OBJECTS`) is our own. Shapes: N pictures, C classes, K things of a lab scene, n image tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from patches.families.base import Base
from patches.families.vlm import Picture, encode
from patches.families.vlm.chat import question
from patches.families.vlm.layouts import layout
from patches.mechanisms.erase import mentioned
from registry import manifest
from registry.errors import NotFound
from registry.home import cache
from training.lab import company, worlds

COCO_OBJECTS = (
    "person|man|woman|boy|girl|child|kid|people|men|women|children|guy|lady|player|rider|skier|surfer",
    "bicycle|bike", "car|sedan|suv|automobile|taxi|cab", "motorcycle|motorbike|moped", "airplane|plane|jet|aircraft",
    "bus", "train|locomotive", "truck|pickup truck|lorry", "boat|ship|sailboat|canoe|kayak", "traffic light|stoplight",
    "fire hydrant|hydrant", "stop sign", "parking meter", "bench", "bird|duck|goose|seagull|pigeon|owl", "cat|kitten",
    "dog|puppy", "horse|pony", "sheep|lamb|ram|ewe", "cow|bull|calf|cattle", "elephant", "bear|cub", "zebra", "giraffe",
    "backpack|rucksack", "umbrella|parasol", "handbag|purse", "tie|necktie", "suitcase|luggage", "frisbee", "skis|ski",
    "snowboard", "sports ball|ball|baseball|football|soccer ball|tennis ball", "kite", "baseball bat|bat",
    "baseball glove|baseball mitt", "skateboard", "surfboard", "tennis racket|racket|racquet", "bottle",
    "wine glass|goblet", "cup|mug|teacup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich|burger|hamburger", "orange", "broccoli", "carrot", "hot dog|hotdog", "pizza", "donut|doughnut",
    "cake|cupcake",
    "chair|stool|armchair", "couch|sofa", "potted plant|houseplant", "bed", "dining table|table|desk", "toilet|urinal",
    "tv|television|monitor", "laptop|laptop computer", "mouse|computer mouse", "remote|remote control", "keyboard",
    "cell phone|phone|smartphone|cellphone", "microwave", "oven|stove", "toaster", "sink|basin",
    "refrigerator|fridge|freezer", "book|magazine", "clock|wristwatch", "vase", "scissors",
    "teddy bear|stuffed animal|teddy",
    "hair drier|hair dryer|hairdryer", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes, each with the words that CHAIR counts as it; our own table"""


@dataclass(frozen=True)
class Scenes:
    """N pictures and what is in them."""

    name: str
    digest: str
    objects: tuple[str, ...]
    """C entries, a name then "|" and its synonyms"""
    there: Tensor
    """(N, C) bool"""
    partner: Tensor
    """(N,) class that usually comes with what is there, -1 unknown; in neutral scenes one drawn by chance"""
    picture: Callable[[int], Image.Image]
    things: Tensor | None = None
    """(N, K) classes of the lab's things, -1 nothing"""
    share: Tensor | None = None
    """(N, K, n): how much of each thing an image token's square shows (lab scenes)"""

    def __len__(self) -> int:
        return len(self.there)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(o.split("|")[0] for o in self.objects)


@dataclass(frozen=True)
class Seen:
    """Scenes as one base's tower sees them, ready for its decoder."""

    scenes: Scenes
    features: list[Tensor]
    """per picture (n, D)"""
    prompts: list[list[int]]
    """per picture, ids of the question, image tokens in place"""
    shapes: list[dict[str, Tensor]]
    """per picture, what rotary positions are bent by (Qwen's grids); empty elsewhere"""
    length: int = 24
    """tokens a caption may have, before and after an erasure"""

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def alike(self) -> bool:
        """All pictures have the same prompt."""
        return all(p == self.prompts[0] for p in self.prompts)

    def row(self, i: int, prompt: list[int] | None = None, **how: Any) -> Picture:
        """A row that shows picture i, its tower done. prompt: instead of the question. how: fields of `Picture`."""
        ids = self.prompts[i] if prompt is None else prompt
        return Picture(ids, features=self.features[i], pixels=self.shapes[i], **how)

    def asked(self, ids: list[int], i: int, token: int) -> list[int]:
        """The prompt `ids`, made with picture 0, for picture i: with that one's run of image tokens."""
        if self.prompts[i] == self.prompts[0]:
            return ids
        a, b = _run(ids, token)
        c, d = _run(self.prompts[i], token)
        return [*ids[:a], *self.prompts[i][c:d], *ids[b:]]


def _run(ids: list[int], token: int) -> tuple[int, int]:
    """From the first image token to after the last; between them stand marks of tiles and rows, if any."""
    return ids.index(token), len(ids) - ids[::-1].index(token)


def lab(split: str, n: int, seed: int, kind: str) -> Scenes:
    """Scenes of `worlds.coco(kind=...)`."""
    from torchvision.transforms.functional import to_pil_image

    data = worlds.coco(split, n, seed, kind=kind)  # type: ignore[arg-type]
    things, head = company.company_things(n, kind, 0.9, company.company_start(split, n, seed, kind))  # type: ignore[arg-type]
    C = len(data.classes)
    there = torch.zeros(n, C + 1, dtype=torch.bool).scatter_(1, things.where(things >= 0, torch.tensor(C)), True)[:, :C]
    partner = torch.where(head >= 0, head + len(worlds.PAIRS), -1)
    if kind == "neutral":
        partner = _drawn(there, seed)
    return Scenes(
        f"lab:{kind}/{split}", data.digest, data.classes, there, partner,
        lambda i: to_pil_image(data.read([i]).image[0]), things,
    )  # fmt: skip


def _drawn(there: Tensor, seed: int) -> Tensor:
    """(N,) an absent partner drawn for each of N pictures (N, C) that hold no pair's first: what a partner is named
    with where nothing speaks for it."""
    P, g = len(worlds.PAIRS), torch.Generator().manual_seed(seed)
    return P + (torch.rand(len(there), P, generator=g) - 2.0 * there[:, P : 2 * P]).argmax(1)


def coco(pictures: str, annotations: str, captions: str = "", n: int = 500, seed: int = 0) -> Scenes:
    """n pictures of a COCO split, chosen by seed. captions: the reference captions' file, whose objects count as there.

    Raises NotFound for a missing file.
    """
    for file in (pictures, annotations, *([captions] if captions else [])):
        if not Path(file).exists():
            raise NotFound(f"{file} is not there. Give COCO's folder of pictures and its instances_*.json.")
    about = json.loads(Path(annotations).read_text())
    names = {c["id"]: c["name"] for c in about["categories"]}
    column = {o.split("|")[0]: i for i, o in enumerate(COCO_OBJECTS)}
    labels: dict[int, set[int]] = {image["id"]: set() for image in about["images"]}
    for a in about["annotations"]:
        if names[a["category_id"]] in column:
            labels[a["image_id"]].add(column[names[a["category_id"]]])
    if captions:
        for a in json.loads(Path(captions).read_text())["annotations"]:
            if a["image_id"] in labels:
                labels[a["image_id"]] |= {column[o] for o in mentioned(a["caption"], COCO_OBJECTS)}
    files = {image["id"]: image["file_name"] for image in about["images"] if labels[image["id"]]}
    g = torch.Generator().manual_seed(seed)
    ids = sorted(files)
    chosen = [ids[i] for i in torch.randperm(len(ids), generator=g)[:n].tolist()]
    there = torch.zeros(len(chosen), len(COCO_OBJECTS), dtype=torch.bool)
    for row, i in enumerate(chosen):
        there[row, list(labels[i])] = True
    folder = Path(pictures)
    digest = manifest.digest_of({"coco": chosen, "annotations": manifest.sha256(Path(annotations))})
    partner = torch.full((len(chosen),), -1)
    return Scenes(
        "coco", digest, COCO_OBJECTS, there, partner, lambda i: Image.open(folder / files[chosen[i]]).convert("RGB")
    )


def see(base: Base, scenes: Scenes, ask: str = "Describe the picture.", length: int = 24, batch: int = 8) -> Seen:
    """Every picture through the base's tower; small results are kept in the cache on disk. length: tokens of a
    caption."""
    from safetensors.torch import load_file, save_file

    key = manifest.digest_of({"base": base.digest, "scenes": scenes.digest, "n": len(scenes)})[:24]
    file, where = cache() / "features" / f"seen-{key}.safetensors", layout(base.model)
    if file.is_file():
        whole = load_file(file)["features"].to(base.device, base.model.dtype)
        prompt = encode(base, question(ask, 1), [scenes.picture(0)]).ids
        return Seen(scenes, list(whole), [prompt] * len(scenes), [{}] * len(scenes), length)
    features: list[Tensor] = []
    prompts: list[list[int]] = []
    shapes: list[dict[str, Tensor]] = []
    plain = True
    for i in range(0, len(scenes), batch):
        made = [encode(base, question(ask, 1), [scenes.picture(j)]) for j in range(i, min(i + batch, len(scenes)))]
        same = all(set(m.pixels) == {"pixel_values"} and m.ids == made[0].ids for m in made)
        with torch.inference_mode():
            if same:
                pixels = torch.cat([m.pixels["pixel_values"] for m in made]).to(base.device, base.model.dtype)
                features += list(
                    where.features(base.model, {"pixel_values": pixels}).unflatten(0, (len(made), -1)).clone()
                )
            else:
                features += [where.features(base.model, _on(base, m.pixels)) for m in made]
        plain = plain and same
        prompts += [m.ids for m in made]
        bent = where.positions is not None
        shapes += [{k: v for k, v in m.pixels.items() if k != "pixel_values"} if bent else {} for m in made]
    seen = Seen(scenes, features, prompts, shapes, length)
    if plain and seen.alike and sum(x.numel() for x in features) < 8_000_000:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.stack(features).float().cpu().contiguous()}, file)
    return seen


def _on(base: Base, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    kind = base.model.dtype
    return {k: v.to(base.device, kind) if v.is_floating_point() else v.to(base.device) for k, v in pixels.items()}


def ask(base: Base, text: str, like: Seen) -> list[int]:
    """Ids of another question about the first picture; `Seen.asked` makes them another one's."""
    return encode(base, question(text, 1), [like.scenes.picture(0)]).ids


def shares(scenes: Scenes, split: str, kind: str, seed: int, side: int) -> Tensor:
    """(N, K, side^2): how much of each thing each image token's square shows; draws the scenes again."""
    parts = []
    for found in worlds.coco(split, len(scenes), seed, kind=kind).batches(32):  # type: ignore[arg-type]
        mask = found.extras["masks"].float()
        step = mask.shape[-1] // side
        inside = mask.unfold(2, step, step).unfold(3, step, step).sum((-1, -2)).flatten(2)
        parts.append(inside / mask.sum((-1, -2)).clamp(min=1)[:, :, None])
    return torch.cat(parts)


def words(base: Base, names: Sequence[str]) -> list[list[int]]:
    """Token ids of every class's name."""
    return [base.processor.word(n) for n in names]
