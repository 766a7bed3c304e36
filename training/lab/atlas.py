"""The sprites: about 1,200 concepts drawn by people in eight styles, from eight open icon sets.

    python -m training.lab.atlas node_modules      # makes atlas/ again; needs `pip install resvg-py` and
    npm install @iconify-json/{noto,noto-v1,twemoji,openmoji,fluent-emoji,fluent-emoji-flat,emojione,emojione-v1} \
        emojibase-data

One lossless WebP sheet per style and an index; names, groups and subgroups are Unicode's. Colours are rounded to 24
levels and opacity to 16, which halves the files and moves no channel by more than 6 of 255 (the renderer's own colour
jitter moves them by 40). Licences and authors: atlas/ATTRIBUTION.md. The style `noto-v1` is held out of everything.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from registry.errors import NotFound, NotReady, Tampered

FOLDER = Path(__file__).parent / "atlas"
INDEX = "index.json"
SIZE, COLUMNS = 64, 40
COLOURS, OPACITIES = 24, 16
STYLES = ("noto", "twemoji", "openmoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "noto-v1")
HELD = "noto-v1"
"""Style held out: no lab model is trained on it"""
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones of a person's sprite; "" is the default yellow"""


@dataclass(frozen=True)
class Atlas:
    """The sprite collection: N RGBA sprites of C concepts in S styles."""

    sprites: Tensor
    """(N, 4, 64, 64) uint8 RGBA, not premultiplied; the RGB of fully transparent pixels is arbitrary"""
    concept: Tensor
    """(N,) int64 index of each sprite's concept in `names`"""
    style: Tensor
    """(N,) int64 index of each sprite's style in `styles`"""
    tone: Tensor
    """(N,) int64 index of each sprite's skin tone in TONES; 0 for sprites without one"""
    names: tuple[str, ...]
    """Concept names, words separated by spaces"""
    groups: tuple[str, ...]
    """Group of each concept: `animals-nature`, `food-drink`, ..."""
    subgroups: tuple[str, ...]
    """Subgroup of each concept: `animal-bird`, `person-role`, ..."""
    styles: tuple[str, ...]
    """Names of the styles, in the order of STYLES"""
    table: Tensor
    """(C, S) int64 index of the sprite of a concept in a style, without skin tone; -1 where that style lacks the
    concept"""
    digest: str
    """SHA-256 of the index file, which holds the hash of every sheet: 64 hex digits"""

    def find(self, name: str) -> int:
        """Return the index of the concept called `name`. Raises NotFound, suggesting names that share a word."""
        if name in self.names:
            return self.names.index(name)
        near = [x for x in self.names if set(x.split()) & set(name.lower().split())][:8]
        raise NotFound(f"The atlas has no {name[:60]!r}." + (f" Near: {', '.join(near)}." if near else ""))

    def pick(self, concepts: Any, styles: Any, tones: bool = False) -> Tensor:
        """Return the indices (M,) int64 of all sprites of `concepts` (indices) in `styles` (names).

        tones: whether to include sprites with a skin tone.
        """
        asked, drawn = torch.zeros(len(self.names), dtype=torch.bool), torch.zeros(len(self.styles), dtype=torch.bool)
        asked[torch.as_tensor(list(concepts), dtype=torch.int64)] = True
        drawn[[self.styles.index(s) for s in styles]] = True
        there = asked[self.concept] & drawn[self.style]
        return torch.where(there if tones else there & (self.tone == 0))[0]


@dataclass(frozen=True)
class Person:
    """Attributes that the Unicode name of a person's emoji states."""

    gender: str
    """man, woman, or "" if the name states none"""
    hair: str
    """blond, red, white, curly, bald, or "" if the name states none (most styles then draw it dark or brown)"""
    beard: bool
    """Whether the name states a beard"""
    age: str
    """baby, child, old, or "" if the name states none"""
    does: str
    """role, sport or activity: `firefighter`, `swimming`; "" for a portrait"""


def person(name: str) -> Person | None:
    """Parse a concept's name into a person's attributes; return None if the concept is not a person."""
    word = name.split()
    young = {"boy": ("man", "child"), "girl": ("woman", "child"), "child": ("", "child"), "baby": ("", "baby")}
    if name in young:
        gender, age = young[name]
        return Person(gender, "", False, age, "")
    if word[0] in ("old", "older"):
        if word[1] not in ("man", "woman", "person"):  # "old key" is a concept, too
            return None
        return Person(word[1] if word[1] != "person" else "", "", False, "old", "")
    if word[0] not in ("man", "woman", "person"):
        return None
    gender, rest = word[0].replace("person", ""), " ".join(word[1:])
    hair = next(
        (h for h in ("blond", "red", "white", "curly") if rest == f"{h} hair"), "bald" if rest == "bald" else ""
    )
    beard = rest == "beard"
    return Person(gender, hair, beard, "", "" if hair or beard else rest)


@cache
def load(folder: Path = FOLDER) -> Atlas:
    """Load the sprite collection from `folder`.

    Raises NotFound if there is none, Tampered if a sheet's hash differs from the one in the index.
    """
    file = folder / INDEX
    if not file.is_file():
        raise NotFound(f"There is no sprite atlas in {folder}. Make it again: python -m training.lab.atlas --help.")
    raw = file.read_bytes()
    index = json.loads(raw)

    def drawn(about: dict[str, Any]) -> np.ndarray:
        sheet = (folder / about["sheet"]).read_bytes()
        if hashlib.sha256(sheet).hexdigest() != about["sha256"]:
            raise Tampered(f"{folder / about['sheet']} is not the sheet that {INDEX} describes. Get the file again.")
        return _cut(np.asarray(Image.open(io.BytesIO(sheet)).convert("RGBA")), len(about["concepts"]))

    with ThreadPoolExecutor() as pool:  # decoding WebP releases the GIL, so threads help
        sprites = list(pool.map(drawn, index["styles"]))
    style = [i for i, part in enumerate(sprites) for _ in part]
    names, groups, subgroups = zip(*index["concepts"], strict=True)
    concept = torch.tensor([c for about in index["styles"] for c in about["concepts"]])
    tone = torch.tensor([t for about in index["styles"] for t in about["tones"]])
    table = torch.full((len(names), len(index["styles"])), -1)
    plain = torch.where(tone == 0)[0]
    table[concept[plain], torch.tensor(style)[plain]] = plain
    return Atlas(
        torch.from_numpy(np.concatenate(sprites)).permute(0, 3, 1, 2).contiguous(),
        concept,
        torch.tensor(style),
        tone,
        names,
        groups,
        subgroups,
        tuple(about["name"] for about in index["styles"]),
        table,
        hashlib.sha256(raw).hexdigest(),
    )


# ---- making it ---------------------------------------------------------------------------------------------------

TITLES = {
    "noto": "Noto Emoji", "twemoji": "Twemoji", "openmoji": "OpenMoji", "fluent-emoji": "Fluent Emoji",
    "fluent-emoji-flat": "Fluent Emoji Flat", "emojione": "EmojiOne 2", "emojione-v1": "EmojiOne 1",
    "noto-v1": "Noto Emoji, first version",
}  # fmt: skip
_OTHER_GROUPS = {"flags", "symbols"}
_OTHER_SUBGROUPS = {
    "time", "transport-sign", "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed",
    "hands", "hand-prop", "family", "person-symbol",
}  # fmt: skip


def build(packages: Path, folder: Path = FOLDER, method: int = 2) -> None:
    """Rasterise the icon sets under `packages` (a node_modules) into `folder`: sheets, index and ATTRIBUTION.md.

    A concept is kept if Unicode names it, it is an object, a place or a person (no flag, sign, clock or hand), and at
    least four styles have it. method: effort of the WebP encoder, 0-6. Raises NotReady without resvg-py, NotFound
    without a package.
    """
    try:
        import resvg_py
    except ImportError:
        raise NotReady("Drawing SVGs needs resvg-py: pip install resvg-py. Only this job needs it.") from None
    unicode_ = _unicode(packages)
    icons = {s: _read(packages / "@iconify-json" / s / "icons.json") for s in STYLES}

    def draw(style: str, key: str) -> np.ndarray | None:
        box, icon = icons[style], icons[style]["icons"].get(key)
        if icon is None or icon.get("hidden"):
            return None
        edge = [icon.get("left", 0), icon.get("top", 0)]
        edge += [icon.get(k, box.get(k, 16)) for k in ("width", "height")]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, edge))}">{icon["body"]}</svg>'
        )
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        except (ValueError, RuntimeError):  # a few icons are not valid SVG
            return None
        picture = Image.open(io.BytesIO(png)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        pixels = _round(np.asarray(picture))
        return pixels if pixels[..., 3].mean() >= 5 else None

    drawn = {s: {n: x for n in unicode_ if (x := draw(s, _key(s, n, ""))) is not None} for s in STYLES}
    count = Counter(n for of in drawn.values() for n in of)
    names = sorted(n for n in unicode_ if count[n] >= 4)
    place = {n: i for i, n in enumerate(names)}
    folder.mkdir(parents=True, exist_ok=True)
    styles = []
    for s in STYLES:
        rows = [(place[n], 0, x) for n, x in drawn[s].items() if n in place]
        people = [n for n in names if unicode_[n][1] == "person"]
        toned = ((n, t, draw(s, _key(s, n, tone))) for n in people for t, tone in enumerate(TONES) if tone)
        rows += [(place[n], t, x) for n, t, x in toned if x is not None]
        rows.sort(key=lambda row: row[:2])
        sheet = io.BytesIO()
        Image.fromarray(_sheet([x for _, _, x in rows])).save(sheet, "WEBP", lossless=True, quality=80, method=method)
        (folder / f"{s}.webp").write_bytes(sheet.getvalue())
        info = _read(packages / "@iconify-json" / s / "info.json")
        version = _read(packages / "@iconify-json" / s / "package.json")["version"]
        styles.append(
            {
                "name": s,
                "title": TITLES[s],
                "author": info["author"]["name"],
                "source": info["author"]["url"],
                "licence": info["license"]["spdx"],
                "licence_url": info["license"]["url"],
                "package": f"@iconify-json/{s}@{version}",
                "sheet": f"{s}.webp",
                "sha256": hashlib.sha256(sheet.getvalue()).hexdigest(),
                "concepts": [c for c, _, _ in rows],
                "tones": [t for _, t, _ in rows],
            }
        )
    concepts = [[n.replace("-", " "), *unicode_[n]] for n in names]
    emojibase = _read(packages / "emojibase-data" / "package.json")["version"]
    about = {"names": f"emojibase-data@{emojibase}", "concepts": concepts, "styles": styles}
    (folder / INDEX).write_text(json.dumps(about, separators=(",", ":")) + "\n")
    (folder / "ATTRIBUTION.md").write_text(_attribution(styles, emojibase))


def _unicode(packages: Path) -> dict[str, tuple[str, str]]:
    """Map the slug of each Unicode name that can be a concept to its (group, subgroup)."""
    about = _read(packages / "emojibase-data" / "en" / "messages.json")
    group = {g["order"]: g["key"] for g in about["groups"]}
    subgroup = {g["order"]: g["key"] for g in about["subgroups"]}
    out = {}
    for emoji in _read(packages / "emojibase-data" / "en" / "data.json"):
        name, g, s = _slug(emoji["label"]), group.get(emoji.get("group")), subgroup.get(emoji.get("subgroup"))
        if g is None or s is None or g in _OTHER_GROUPS or s in _OTHER_SUBGROUPS or "skin-tone" in name:
            continue
        twice = name.startswith("person-") or any(x in name for x in ("facing-right", "couple", "kiss", "famil"))
        if not (g == "people-body" and twice):
            out[name] = (g, s)
    return out


def _slug(label: str) -> str:
    """Lowercase a Unicode label and join its words by hyphens, as icon sets name their icons."""
    plain = label.lower().replace("’", "").replace("'", "").replace("ñ", "n").replace("é", "e")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _key(style: str, name: str, tone: str) -> str:
    """Return an icon set's key for the concept with slug `name` and skin tone `tone`; sets spell these differently."""
    if style.startswith("fluent"):
        name = name.replace("blond-", "blonde-")
        return f"{name}-{tone}" if tone else name
    if not tone:
        return name
    who, _, hair = name.partition("-") if name.startswith(("man-", "woman-")) else (name, "", "")
    return f"{who}-{tone}-skin-tone" + (f"-{hair}" if hair else "")


def _round(pixels: np.ndarray) -> np.ndarray:
    """Quantise RGBA pixels (64, 64, 4) uint8 to 24 levels a colour and 16 of opacity; clear pixels become 0."""
    levels = np.array([COLOURS - 1] * 3 + [OPACITIES - 1])
    out: np.ndarray = np.round(np.round(pixels / 255 * levels) / levels * 255).astype(np.uint8)
    out[out[..., 3] == 0] = 0
    return out


def _sheet(sprites: list[np.ndarray]) -> np.ndarray:
    """Tile n sprites (64, 64, 4) into one sheet (rows * 64, 40 * 64, 4), row by row."""
    rows = -(-len(sprites) // COLUMNS)
    out = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
    out[: len(sprites)] = sprites
    return out.reshape(rows, COLUMNS, SIZE, SIZE, 4).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 4)


def _cut(sheet: np.ndarray, count: int) -> np.ndarray:
    """Cut a sheet back into its first `count` sprites (count, 64, 64, 4): the inverse of `_sheet`."""
    grid = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 4).swapaxes(1, 2)
    return grid.reshape(-1, SIZE, SIZE, 4)[:count]


def _read(file: Path) -> Any:
    if not file.is_file():
        raise NotFound(f"There is no {file}. Install the packages that training/lab/atlas.py names, then try again.")
    return json.loads(file.read_text())


def _attribution(styles: list[dict[str, Any]], emojibase: str) -> str:
    rows = [
        f"| `{s['sheet']}` | [{s['title']}]({s['source']}) | {s['author']} | [{s['licence']}]({s['licence_url']}) "
        f"| {s['package']} |"
        for s in styles
    ]
    return "\n".join(
        [
            "# Whose pictures these are",
            "",
            "Every sheet holds pictures of one icon set and stays under that set's licence, which is not that of this",
            "project's code. Changes made to all of them: drawn from SVG at 64 x 64 pixels, colours rounded to 24",
            "levels and opacity to 16, laid side by side. Sheets under CC BY-SA stay under CC BY-SA; so do pictures",
            "rendered from them.",
            "",
            "| sheet | icon set | author | licence | taken from |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Names, groups and subgroups: Unicode's, as in emojibase-data@{emojibase} (MIT, Miles Johnson).",
            "The texts of Apache-2.0 and of MIT lie beside this file; those of CC BY 4.0 and CC BY-SA 4.0 are at the",
            "links above.",
            "",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
