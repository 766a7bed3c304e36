"""The pool of texts for the lab world: what a head of `lab:clip` may be about, in words that model has read.

A small grammar over the atlas' names, so the pool is made, not stored: about 1,900 sentences, each about one property
by construction. Any other .txt can take its place (training/tasks/textspan.py: read_pool). Print it with

    python -m training.lab.pool > pool.txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from training.lab import atlas
from training.lab.renderer import GROUNDS

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")
COLOURED = ("heart", "circle", "square", "book", "apple", "hair", "diamond", "mushroom", "cat")
"""what the atlas draws in several colours"""
SHORT = 11
"""letters of a word that the lab can write large enough to be read"""
_OF_GROUP = {
    "people-body": "person",
    "food-drink": "food",
    "animals-nature": "nature",
    "smileys-emotion": "face",
    "travel-places": "place",
    "objects": "object",
    "activities": "object",
}
"""Unicode's groups -> property"""
PLANTED = ("background", "text", "colour", "person", "food")
"""properties that the renderer sets one by one, so that what a head is called can be checked on pictures"""
PROPERTIES = (*PLANTED, "nature", "face", "place", "object")
"""what a sentence may be about"""


@cache
def sentences() -> tuple[tuple[str, str], ...]:
    """(text, property), each text once."""
    lab = atlas.load()
    out: dict[str, str] = {}
    for ground in GROUNDS:
        for text in (f"a picture of {ground}", f"a picture on {ground}", f"a photo on {ground}", f"on {ground}"):
            out[text] = "background"
    for name in lab.names:
        if coloured(name):
            out[f"a picture of a {name}"] = "colour"
    for colour in COLOURS:
        for text in (f"a picture of a {colour} circle", f"a drawing of a {colour} heart", f"{colour}"):
            out.setdefault(text, "colour")
    for name, group in zip(lab.names, lab.groups, strict=True):
        out.setdefault(f"a picture of a {name}", _OF_GROUP[group])
        if len(name) <= SHORT:
            out[f"the word {name}"] = "text"
    return tuple(out.items())


def coloured(name: str) -> str:
    """The colour a name says of a thing that comes in several; "" if none."""
    words = name.split()
    return words[-2] if len(words) > 1 and words[-1] in COLOURED and words[-2] in COLOURS else ""


def texts() -> tuple[str, ...]:
    return tuple(text for text, _ in sentences())


def fits(properties: Sequence[str] = PROPERTIES) -> Tensor:
    """(M, P) bool: which property each text is about; exactly one."""
    return torch.tensor([[kind == p for p in properties] for _, kind in sentences()])


if __name__ == "__main__":
    sys.stdout.writelines(f"{text}\n" for text in texts())
