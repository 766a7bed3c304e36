"""Row parameters: what one request says to one mechanism reaches its own rows and no others."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict

from patches.engine.edits import Act
from patches.engine.patch import Patch, apply
from patches.families.llm.worker import Decoder, Row
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry.errors import Invalid, PatchError

D = 32
IDS = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))


class Ask(BaseModel):
    """How far to shift, in each of some dimensions."""

    model_config = ConfigDict(extra="forbid", strict=True)
    shift: dict[int, float]


@dataclass(frozen=True)
class NoConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Shift(Patch):
    """Add a row's own vectors (n, D) to every token."""

    Config = NoConfig
    Ask = Ask

    def edits(self):
        def fn(x, inputs):
            shift = inputs.row("shift")
            return x if shift is None else x + shift.sum(1, keepdim=True).to(x)

        return [Act("model.layers.1", fn)]

    def params(self, ask, base):
        out = torch.zeros(max(1, len(ask.shift)), D)
        for i, (dimension, by) in enumerate(ask.shift.items()):
            out[i, dimension] = by
        return {"shift": out}


def vectors(n, seed):
    return {"shift": torch.randn(n, D, generator=torch.Generator().manual_seed(seed))}


@torch.inference_mode()
def alone(base, row, params, strength=1.0):
    with apply(base.model, {"a": Shift(NoConfig(), {})}) as on, on.rows(["a"], [strength], [params]):
        return base.model(input_ids=IDS[row : row + 1]).logits[0]


@torch.inference_mode()
def test_rows_of_one_batch_say_different_things(tiny_llm):
    said = [vectors(3, 0), vectors(1, 1), {}, vectors(2, 2)]
    want = [alone(tiny_llm, i, p) for i, p in enumerate(said)]
    with apply(tiny_llm.model, {"a": Shift(NoConfig(), {})}) as on:
        with on.rows(["a"] * 4, None, said):
            together = tiny_llm.model(input_ids=IDS).logits
        with on.rows([None, "a", None, "a"], None, said):
            mixed = tiny_llm.model(input_ids=IDS).logits
        base = tiny_llm.model(input_ids=IDS).logits
    torch.testing.assert_close(together, torch.stack(want), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed, torch.stack([base[0], want[1], base[2], want[3]]), atol=1e-5, rtol=0)
    assert torch.equal(want[2], alone(tiny_llm, 2, {"other": torch.ones(1)}))


@torch.inference_mode()
def test_parameters_follow_their_row_into_beams(tiny_llm):
    said = [vectors(2, 3), vectors(1, 4)]
    with apply(tiny_llm.model, {"a": Shift(NoConfig(), {})}) as on, on.rows(["a", "a"], [1.0, 0.5], said):
        wide = tiny_llm.model(input_ids=IDS[[0, 0, 1, 1]]).logits
    for row, strength in ((0, 1.0), (1, 0.5)):
        want = alone(tiny_llm, row, said[row], strength)
        for beam in (0, 1):
            torch.testing.assert_close(wide[2 * row + beam], want, atol=1e-5, rtol=0)


def test_scalars_stack_and_shapes_that_differ_are_refused(tiny_llm):
    seen: ClassVar = []

    @dataclass(frozen=True)
    class Look(Patch):
        Config = NoConfig

        def edits(self):
            return [Act("model.layers.0", lambda x, inputs: (seen.append(inputs.row("t")), x)[1])]

    with apply(tiny_llm.model, {"a": Look(NoConfig(), {})}) as on:
        with on.rows(["a", "a"], None, [{"t": torch.tensor(2.0)}, {"t": torch.tensor(3.0)}]):
            tiny_llm.model(input_ids=IDS[:2])
        assert seen[0].tolist() == [2.0, 3.0]
        with (
            on.rows(["a", "a"], None, [{"t": torch.ones(1, 2)}, {"t": torch.ones(1, 3)}]),
            pytest.raises(PatchError, match="differ in shape"),
        ):
            tiny_llm.model(input_ids=IDS[:2])


def test_jobs_carry_their_parameters_through_decoding(tiny_llm):
    patch = Shift(NoConfig(), {})
    said = [patch.params(Ask(shift={0: 3.0, 5: -2.0}), tiny_llm), {}, patch.params(Ask(shift={7: 4.0}), tiny_llm)]
    with apply(tiny_llm.model, {"a": patch}, root="model") as on:
        together = [Row([5, 9, 30 + i], arm="a", params=p, max_tokens=8, ignore_eos=True) for i, p in enumerate(said)]
        Decoder(tiny_llm, on).run(together)
        for i, p in enumerate(said):
            row = Row([5, 9, 30 + i], arm="a", params=p, max_tokens=8, ignore_eos=True)
            Decoder(tiny_llm, on).run([row])
            assert row.out == together[i].out
    assert len({tuple(r.out) for r in together}) > 1


def test_a_mechanism_that_asks_for_nothing_says_so(tiny_llm):
    silent = SinkEdit(SinkConfig(neurons=((0, 1),)), {})
    with pytest.raises(Invalid, match="takes nothing from a request"):
        silent.params(None, tiny_llm)


# ---- arms that are alike -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class By:
    """How much of a row's shift is added."""

    by: float


@dataclass(frozen=True)
class AlikeShift(Patch):
    """Add a row's own vectors, `by` times; patches of the same `by` are alike."""

    Config = By
    seen: ClassVar = []
    """rows and tokens of each call"""

    def edits(self):
        by = self.config.by

        def fn(x, inputs):
            self.seen.append(tuple(x.shape[:2]))
            return x + by * inputs.row("shift").sum(1, keepdim=True).to(x)

        return [Act("model.layers.1", fn, alike=by, prefill=True)]


@torch.inference_mode()
def test_rows_of_alike_arms_go_through_their_edits_in_one_call(tiny_llm):
    patches = {"a": AlikeShift(By(1.0), {}), "b": AlikeShift(By(1.0), {}), "c": AlikeShift(By(-2.0), {})}
    names = ["a", "c", None, "b"]
    said, strength = [vectors(n, n) for n in (1, 2, 3, 2)], [1.0, 0.5, 1.0, 2.0]
    AlikeShift.seen.clear()
    with apply(tiny_llm.model, patches) as on:
        with on.rows(names, strength, said):
            got = tiny_llm.model(input_ids=IDS).logits
        assert sorted(AlikeShift.seen) == [(1, 6), (2, 6)]
        assert on.unreached() == []
        with on.rows(names, strength, said):
            tiny_llm.model(input_ids=IDS[:, :1])
        assert len(AlikeShift.seen) == 2, "an edit of prefills ran where one token came"
        on.remove("a")
        with on.rows(["b"], [2.0], said[3:]):
            alone_again = tiny_llm.model(input_ids=IDS[3:]).logits[0]
    for i, name in enumerate(names):
        with apply(tiny_llm.model, patches) as on, on.rows([name], strength[i : i + 1], said[i : i + 1]):
            torch.testing.assert_close(got[i], tiny_llm.model(input_ids=IDS[i : i + 1]).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone_again, got[3], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[2], tiny_llm.model(input_ids=IDS).logits[2], atol=0, rtol=0)
