"""The lab's bank of captions: names, grounds, counts, colours and pairs, made and not collected.

    python -m training.mils.bank > patches/lab/mils/bank.txt

The paper's bank holds lines about 1,000 ImageNet classes; this one lines about the lab's 100. No line names two things
that one picture of the test split shows, so no test picture's own caption is in it.
"""

from __future__ import annotations

import sys
from functools import cache

import torch

from training.lab import atlas, pool, worlds
from training.lab.renderer import GROUNDS, generator
from training.mils.scenes import pairs

LINES = 3400
"""so many, of which the pairs are drawn at random"""


@cache
def lines() -> tuple[str, ...]:
    classes = worlds.imagenet_classes()
    out: dict[str, None] = {}
    for name in classes:
        out[f"a picture of a {name}"] = None
        out |= dict.fromkeys(f"a picture of a {name} on {ground}" for ground in GROUNDS)
        out[f"a picture of two {name}"] = None
    for name in atlas.load().names:
        if pool.coloured(name):
            out[f"a picture of a {name}"] = None
    for ground in GROUNDS:
        out[f"a picture of {ground}"] = None
    known = {frozenset(pair) for pair in pairs("test")}
    g = generator("mils/bank", 0)
    while len(out) < LINES:
        a, b, at = (int(torch.randint(n, (), generator=g)) for n in (len(classes), len(classes), 2 * len(GROUNDS)))
        if a != b and frozenset((classes[a], classes[b])) not in known:
            where = f" on {GROUNDS[at]}" if at < len(GROUNDS) else ""
            out[f"a picture of a {classes[a]} and a {classes[b]}{where}"] = None
    return tuple(out)


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
