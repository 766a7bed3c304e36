"""The full comparison: the shipped direction against controls, other inversions, baselines, few examples, and the
smallest change.

All on test, none of it chosen there. Every row of the main table is over the same pictures, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.families.diffusion import levels
from patches.subject import Subject
from registry.measure import Better, Measure
from training.diffusion_cf import find, judges
from training.diffusion_cf.config import Config
from training.diffusion_cf.edit import Editor, How, smallest
from training.diffusion_cf.figures import strips
from training.diffusion_cf.rows import how, learned, pictures

WAYS = {
    "ddim": "DDIM", "o_belm": "O-BELM", "edit_friendly": "edit-friendly noise, twice the levels", "edict": "EDICT",
}  # fmt: skip
TOP = 3.0
"""class gaps up to which the smallest change is looked for"""
ROUNDS = 3
CONTROL = "control: another class"
Say = Callable[[str, dict[str, Any]], None]
Put = Callable[[str, str, dict[str, Any]], None]


class Bench:
    """Test pictures of a subject with judges, directions and inverted states: what every row of the tables starts
    from."""

    def __init__(self, subject: Subject, config: Config) -> None:
        self.config, self.base = config, subject.base
        self.editor, self.how = Editor(subject), how(config, subject.base)
        self.train, self.bank = learned(config, self.editor, subject.base)
        self.test = pictures(config, subject.base, "test", config.report_images)
        self.judges = (
            judges.own_judges(config, self.test) if config.data else judges.lab_judges(self.test.classes, config.judges)
        )
        arm = subject.arms.get(subject.only) if subject.only else None
        self.amount: float = arm.config.amount if arm is not None else 1.0  # type: ignore[union-attr]
        self.conditions = self.editor.conditions(self.test.x)
        self.states = self.inverted(self.how)
        self._aim()

    def _aim(self) -> None:
        self.target = self.test.partner()
        self.directions = self.bank.directions(self.test.label, self.target)
        self.elsewhere = find.elsewhere(self.bank, self.test.label, self.target, self.directions, self.config.seed)

    def few(self, count: int) -> Bench:
        """The first `count` pictures of each class, their states taken along."""
        keep = [i for c in range(len(self.test.classes)) for i in torch.where(self.test.label == c)[0][:count].tolist()]
        out = copy(self)
        out.test = self.test.take(torch.tensor(keep))
        out.conditions, out.states = [self.conditions[i] for i in keep], [self.states[i] for i in keep]
        out._aim()
        out.elsewhere = self.elsewhere[keep]
        return out

    def judge(self, made: Tensor) -> judges.Judged:
        """Measures of what was made of the test pictures."""
        return judges.judged(self.judges, self.test, self.target, made)

    def inverted(self, h: How) -> list[Tensor]:
        """States of the test pictures."""
        return self.editor.invert(self.test.x, self.conditions, h, self.config.seed)

    def along(self, directions: Tensor, h: How | None = None, states: list[Tensor] | None = None) -> Tensor:
        """Test pictures moved by the shipped amount."""
        states = self.states if states is None else states
        return self.editor.along(states, self.conditions, directions, self.amount, h or self.how)

    def same(self, h: How, states: list[Tensor]) -> Tensor:
        """Test pictures inverted and given back."""
        return self.editor.regenerate(states, self.conditions, self.conditions, replace(h, guidance=1.0))


def report(folder: Path, config: Config, say: Say | None = None) -> dict[str, Any]:
    """{name: {row: {measure: Measure}}, "strips": Figure}. say: told each row when it is there."""
    subject = Subject.load(folder, config.base, config.device)
    tables: dict[str, dict[str, Any]] = {}

    def put(table: str, row: str, value: dict[str, Any]) -> None:
        tables.setdefault(table, {})[row] = {k: _measure(k, v) for k, v in value.items() if v}
        if say is not None:
            say(f"{table}: {row}", value)

    try:
        bench = Bench(subject, config)
        shown = _main(bench, put)
        few = bench.few(config.report_few)
        for part in (_controls, _examples, _baselines, _inversions, _smallest):
            part(few, put)
    finally:
        subject.close()
    return {**tables, "strips": strips(bench.test, bench.target, shown)}


def _main(b: Bench, put: Put) -> dict[str, Tensor]:
    """The direction at the shipped amount, and a step of its length towards a class of another domain."""
    shown: dict[str, Tensor] = {}
    judged: dict[str, judges.Judged] = {}
    for name, d in (("direction", b.directions), (CONTROL, b.elsewhere)):
        shown[name] = b.along(d)
        judged[name] = b.judge(shown[name])
        put("main", name, judged[name].summary())
        put("by domain", name, judged[name].by_domain("flip_both"))
    put("main", "originals", b.judge(b.test.x).summary())
    keys = [k for k in ("flip_both", "top1_cnn", "l1") if k in judged["direction"].values]
    pair = {k: judges.paired(judged["direction"].values[k], judged[CONTROL].values[k], b.test.sprite) for k in keys}
    put("main", "direction - control", pair)
    return shown


def _controls(b: Bench, put: Put) -> None:
    """Inversion alone, a step of equal length in a direction drawn from the sphere; the direction on the same
    pictures."""
    put("controls", "direction", b.judge(b.along(b.directions)).summary())
    put("controls", "inversion alone", b.judge(b.same(b.how, b.states)).summary())
    put("controls", "isotropic", b.judge(b.along(find.isotropic(b.directions, b.config.seed))).summary())


def _examples(b: Bench, put: Put) -> None:
    """Class means from few pictures, one draw each."""
    for count in b.config.few:
        d = b.bank.few(count, b.config.seed).directions(b.test.label, b.target)
        row = b.judge(b.along(d)).summary()
        row["cosine"] = judges.interval(F.cosine_similarity(d, b.directions), b.test.sprite)
        put("examples a class", str(count), row)


def _inversions(b: Bench, put: Put) -> None:
    """The same direction through every inversion."""
    few, many = (levels(b.base.model, n * b.config.levels) for n in (1, 2))
    for method in b.config.beside:
        h = replace(b.how, method=method, levels=many if method == "edit_friendly" else few)
        name = WAYS[method]
        before = b.editor.evaluations
        states = b.inverted(h)
        row = b.judge(b.along(b.directions, h, states)).summary()
        row["evaluations"] = [(b.editor.evaluations - before) / len(b.test)]
        row["reconstruction"] = judges.interval((b.same(h, states) - b.test.x).abs().flatten(1).mean(1), b.test.sprite)
        put("inversions", name, row)
    null = replace(b.how, guidance=4.0, against="null")
    put("inversions", "fixed point, guidance 4 from nothing", b.judge(b.along(b.directions, null)).summary())


def _baselines(b: Bench, put: Put) -> None:
    """A class-name prompt instead of the direction, and the nearest real picture of the target class."""
    pipe = b.editor.pipe
    if "text" in pipe.conditions:
        words = pipe.text([f"a picture of a {name}" for name in b.test.classes])
        told = [{**c, "text": words[t]["text"]} for c, t in zip(b.conditions, b.target.tolist(), strict=True)]
        made = b.editor.regenerate(b.states, b.conditions, told, b.how)
        put("baselines", "class-name prompt beside the embedding", b.judge(made).summary())
        told = [words[t] for t in b.target.tolist()]
        made = b.editor.regenerate(b.states, b.conditions, told, b.how)
        put("baselines", "class-name prompt instead of it", b.judge(made).summary())
    vectors = b.editor.vectors(b.editor.conditions(b.train.x))
    near = judges.nearest_real(b.train, vectors, b.editor.vectors(b.conditions), b.target)
    put("baselines", "nearest real picture", b.judge(near).summary())


def _smallest(b: Bench, put: Put) -> None:
    """Bisection for the smallest amount at which the CNN flips, judged by CLIP; along the direction and along the
    control."""
    cnn = b.judges[0]
    columns = torch.tensor([cnn.column(name) for name in b.test.classes])

    def flipped(at: Tensor, made: Tensor) -> Tensor:
        scores, r = cnn.scores(made), torch.arange(len(at))
        return scores[r, columns[b.target[at]]] > scores[r, columns[b.test.label[at]]]

    for name, d in (("direction", b.directions), (CONTROL, b.elsewhere)):

        def make(at: Tensor, amounts: Tensor, d: Tensor = d) -> Tensor:
            rows = at.tolist()
            states, conditions = [b.states[i] for i in rows], [b.conditions[i] for i in rows]
            return b.editor.along(states, conditions, d[at], amounts, b.how)

        amounts, made = smallest(make, flipped, len(b.test), TOP, ROUNDS)
        row = b.judge(made).summary()
        found = ~amounts.isnan()
        row["amount"] = judges.interval(amounts[found], b.test.sprite[found]) if bool(found.any()) else []
        put("smallest change that flips the CNN", name, row)


def _measure(name: str, value: list[float]) -> Measure:
    """[value, low, high, n], or [value] alone, as a Measure."""
    better: Better = "higher" if name.startswith(("flip", "top1", "cosine")) else "lower"
    if len(value) < 4:
        return Measure(float(value[0]))
    return Measure(value[0], value[1], value[2], int(value[3]), better)
