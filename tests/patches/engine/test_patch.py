import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from patches.engine.edits import Act, Side
from patches.engine.patch import Patch, apply
from patches.engine.read import record
from registry.errors import PatchError
from tests.patches.members import MECHANISMS

IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


def test_arms_come_and_go_on_a_live_base(tiny_llm):
    with torch.inference_mode(), apply(tiny_llm.model, {}) as on:
        before = tiny_llm.model(input_ids=IDS).logits
        on.add("a", MECHANISMS["erase"]())
        on.add("b", MECHANISMS["sink-zero"]())
        with on.rows(["a", "b"]):
            both = tiny_llm.model(input_ids=IDS).logits
        on.remove("a")
        with pytest.raises(PatchError, match="no arm 'a'. Arms: b"), on.rows(["a", None]):
            pass
        with on.rows([None, "b"]):
            one = tiny_llm.model(input_ids=IDS).logits
        assert torch.equal(one[0], before[0])
        assert torch.equal(one[1], both[1])


def test_a_call_in_flight_keeps_the_arm_it_named(tiny_llm):
    """Removing an arm while a call runs must not crash it."""
    with torch.inference_mode(), apply(tiny_llm.model, {"a": MECHANISMS["erase"]()}) as on, on.rows(["a", "a"]):
        on.remove("a")
        tiny_llm.model(input_ids=IDS)


def test_weight_edits_cannot_share_a_batch(tiny_llm):
    with pytest.raises(PatchError, match="apply it alone, or fold it"):
        apply(tiny_llm.model, {"a": MECHANISMS["weights"](), "b": MECHANISMS["erase"]()})
    assert not getattr(tiny_llm.model, "_applied", 0)


def test_weight_patches_revert_only_in_order(tiny_llm):
    before = tiny_llm.model.model.layers[0].mlp.down_proj.weight.detach().clone()
    first, second = (MECHANISMS["weights"]().apply(tiny_llm.model) for _ in range(2))
    with pytest.raises(PatchError, match="revert the later patch first"):
        first.revert()
    second.revert()
    first.revert()
    assert torch.equal(tiny_llm.model.model.layers[0].mlp.down_proj.weight, before)


def test_two_activation_patches_revert_in_any_order(tiny_llm):
    with torch.inference_mode():
        before = tiny_llm.model(input_ids=IDS).logits
        first, second = (MECHANISMS[n]().apply(tiny_llm.model) for n in ("erase", "sink-zero"))
        first.revert()
        second.revert()
        assert torch.equal(tiny_llm.model(input_ids=IDS).logits, before)


def test_a_site_that_no_forward_reaches_is_reported(tiny_llm):
    with apply(tiny_llm.model, {"a": MECHANISMS["erase"]()}) as on:
        assert on.unreached() == ["a:model.layers.1"]


def test_rows_must_fit_the_batch(tiny_llm):
    with apply(tiny_llm.model, {"a": MECHANISMS["erase"]()}) as on, on.rows(["a", None, "a", None]):
        with pytest.raises(PatchError, match="names 4 rows, but the batch has 2"):
            tiny_llm.model(input_ids=IDS)


def test_record_sees_each_site_and_leaves_nothing(tiny_llm):
    sites = ["model.layers.0", "model.layers.2"]
    with torch.inference_mode(), record(tiny_llm.model, sites, keep=lambda x: x.norm(dim=-1)) as acts:
        tiny_llm.model(input_ids=IDS)
    assert {k: [tuple(x.shape) for x in v] for k, v in acts.items()} == {s: [(2, 6)] for s in sites}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llm.model.modules())


def test_sixty_four_threads_with_random_patches_get_no_wrong_row(tiny_llm):
    """Every thread names its own arms for its own rows, all on one copy of the base, all at once."""
    arms = {name: make() for name, make in MECHANISMS.items() if name != "weights"}  # rows cannot differ in those
    names, ids = [None, *arms], torch.tensor([[5, 7, 7, 7, 7, 9], [11, 11, 11, 11, 4, 4]])
    with torch.inference_mode(), apply(tiny_llm.model, arms) as on:
        alone = []
        for name in names:
            with on.rows([name] * len(ids)):
                alone.append(tiny_llm.model(input_ids=ids).logits)
        alone = torch.stack(alone)  # (arms, rows, T, V)
        assert all((alone - one).abs().amax(dim=(2, 3)).sort(dim=0).values[1].min() > 1e-3 for one in alone)
        gate = threading.Barrier(64)

        def thread(seed):
            rng, wrong = random.Random(seed), 0
            gate.wait()
            for _ in range(8):
                chosen = [rng.randrange(len(names)) for _ in ids]
                with on.rows([names[i] for i in chosen]), torch.inference_mode():
                    got = tiny_llm.model(input_ids=ids).logits
                nearest = (alone - got).abs().amax(dim=(2, 3)).argmin(dim=0).tolist()
                wrong += sum(a != b for a, b in zip(nearest, chosen, strict=True))
            return wrong

        with ThreadPoolExecutor(64) as pool:
            assert sum(pool.map(thread, range(64))) == 0


class Founded(Patch):
    """A move of an activation, made on a model with a low-rank update of its own."""

    Config = dict

    def edits(self):
        moved = Act("model.layers.1", lambda x, _: x + 1.0)
        return [moved, Side("model.layers.0.mlp.down_proj", lambda x, _: x[..., :1] * self.config["by"], under=True)]


def test_rows_can_ask_for_what_an_arm_starts_from(tiny_llm):
    """The base and the arm's edits marked so; another arm's, and the base's rows beside it, are not touched."""
    model, ids = tiny_llm.model, IDS[:1].expand(5, -1)
    arms = {"a": Founded({"by": 3.0}, {}), "b": MECHANISMS["erase"]()}
    assert isinstance(arms["b"].edits()[0], Act)
    with torch.inference_mode(), apply(model, arms) as on:
        assert [on.founded(name) for name in arms] == [True, False]
        with on.rows(["a", "a", "b", "b", None], under=[False, True, False, True, True]):
            whole, below, erased, started, base = model(input_ids=ids).logits
        with on.rows([None] * 5):
            plain = model(input_ids=ids).logits[0]
        with on.rows(["a"] * 5, strength=[1.0, 0.5, 0.0, 1.0, 1.0], under=[False, True, True, True, False]):
            _, half, none, again, _ = model(input_ids=ids).logits
    for same in (started, base, none):
        torch.testing.assert_close(same, plain)
    torch.testing.assert_close(again, below)
    for one, other in ((whole, below), (below, plain), (erased, plain), (half, below), (half, plain)):
        assert not torch.allclose(one, other, atol=1e-4)
