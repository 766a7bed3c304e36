"""What must hold for EVERY mechanism on EVERY family it is tried on, proved once for all of them.

What only language models have (caches, padding, generation) is asked of those members further down.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patches import artifact
from patches.engine.edits import Weight
from patches.engine.patch import ONLY, apply
from patches.families.family import family
from patches.families.llm.worker import Decoder, Row
from registry.errors import PatchError
from registry.systems import SYSTEMS
from tests.patches.members import LLM, MEMBERS, PROBES

IDS = PROBES["llm"].inputs()["input_ids"]
TOGETHER = [[None, "a", None, "a"], ["a", "a", None, None], [None, "a", "a", None], ["a"] * 4, [None] * 4]


_BASES = {}


def base_of(name):
    """A family's tiny base, made once; tests must leave it bit for bit as it was."""
    if name not in _BASES:
        _BASES[name] = replace(family(name).tiny(0), family=name)
    return _BASES[name]


@pytest.fixture(params=MEMBERS)
def member(request):
    return MEMBERS[request.param]


@pytest.fixture
def base(member):
    return base_of(member.family)


@pytest.fixture
def patch(member):
    return member.make()


@pytest.fixture(params=LLM)
def text_patch(request):
    """A patch that is tried on the language model."""
    return LLM[request.param]()


@torch.inference_mode()
def run(base, model=None):
    """(4, ...) what the base, or a copy of it, answers to its family's probe."""
    probe = PROBES[base.family]
    return probe.read((model or base.model)(**probe.inputs()))


def pure_weights(patch):
    return all(isinstance(e, Weight) for e in patch.edits())


def rows_only(patch):
    """Skips what rows of one batch cannot differ in."""
    if pure_weights(patch):
        pytest.skip("edits weights alone, which rows of one batch share")


ASKED = {"erase"}
"""mechanisms that do nothing until a row says something; their own tests hold them to the same"""


def test_every_mechanism_is_tried():
    files = {f.stem for f in (Path(__file__).parents[2] / "patches" / "mechanisms").glob("*.py")} - {"__init__"}
    tried = {type(m.make()).__module__.rpartition(".")[2] for m in MEMBERS.values()}
    assert files - ASKED <= tried, f"put a member of {files - tried} in tests/patches/members.py"
    assert {m.family for m in MEMBERS.values()} <= PROBES.keys()


def test_apply_changes_the_output(base, patch):
    before = run(base)
    with patch.apply(base.model, root=base.root) as on:
        assert not torch.equal(run(base), before)
        assert on.unreached() == []


def test_revert_is_bit_exact(base, patch):
    before = run(base)
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    patch.apply(base.model, root=base.root).revert()
    assert torch.equal(run(base), before)
    assert all(torch.equal(weights[k], v) for k, v in base.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_strength_zero_is_the_base_bit_for_bit(base, patch):
    before = run(base)
    with patch.apply(base.model, root=base.root, strength=0.0):
        assert torch.equal(run(base), before)


def test_strength_between_lies_between(base, patch):
    before = run(base)
    with patch.apply(base.model, root=base.root, strength=1e-3):
        little = run(base)
    assert 0 < (little - before).abs().max() < 0.3


def test_fold_equals_apply(base, patch, member):
    if not member.folds:
        with pytest.raises(PatchError, match="hooks"):  # the refusal names the alternative
            patch.fold(base.model)
        return
    folded = patch.fold(base.model)
    alone = run(base, folded)
    with patch.apply(base.model, root=base.root):
        torch.testing.assert_close(alone, run(base), atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())


def test_fold_refuses_a_patched_base(base, patch):
    with (
        patch.apply(base.model, root=base.root),
        pytest.raises(PatchError, match="revert it|no weight form|no weights can"),
    ):
        patch.fold(base.model)


@pytest.mark.parametrize("rows", TOGETHER, ids=str)
def test_a_mixed_batch_equals_the_separate_ones(base, patch, rows):
    rows_only(patch)
    before = run(base)
    with apply(base.model, {"a": patch}, root=base.root) as on:
        with on.rows(["a"] * 4):
            after = run(base)
        with on.rows(rows):
            mixed = run(base)
    for i, name in enumerate(rows):
        if name is None:
            assert torch.equal(mixed[i], before[i])
        else:
            torch.testing.assert_close(mixed[i], after[i], atol=1e-5, rtol=1e-5)


def test_strength_holds_per_row(base, patch):
    rows_only(patch)
    with apply(base.model, {"a": patch}, root=base.root) as on:
        alone = {}
        for s in (0.0, 0.5, 1.0):
            with on.rows(["a"] * 4, [s] * 4):
                alone[s] = run(base)
        with on.rows(["a"] * 4, [0.0, 0.5, 1.0, 0.5]):
            mixed = run(base)
    for i, s in enumerate([0.0, 0.5, 1.0, 0.5]):
        torch.testing.assert_close(mixed[i], alone[s][i], atol=1e-5, rtol=1e-5)


def test_threads_never_get_each_others_arm(base, patch):
    rows_only(patch)
    before = run(base)
    with apply(base.model, {"a": patch}, root=base.root) as on:
        with on.rows(["a"] * 4):
            after = run(base)

        def call(seed):
            names = random.Random(seed).choices([None, "a"], k=4)
            with on.rows(names):
                got = run(base)
            return all(
                torch.allclose(got[i], (after if n else before)[i], atol=1e-5, rtol=1e-5) for i, n in enumerate(names)
            )

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(call, range(64)))


def test_save_and_load_round_trip(base, tmp_path, patch):
    row = next((r for r in SYSTEMS.values() if r.patch and r.patch.endswith(f":{type(patch).__name__}")), None)
    if row is None:
        pytest.skip("only shipped mechanisms have a row in the table")
    about = artifact.save(patch, row.name, tmp_path / "a", base=base.label)
    again, loaded = artifact.load(tmp_path / "a", digest=about.digest, base=base.digest)
    assert again == about
    assert loaded.config == patch.config
    with patch.apply(base.model, root=base.root):
        want = run(base)
    with loaded.apply(base.model, root=base.root):
        assert torch.equal(run(base), want)


def test_a_failed_apply_leaves_nothing_behind(base, patch):
    before = run(base)

    class Broken(type(patch)):
        def edits(self):
            return [*super().edits(), replace(super().edits()[-1], site="nowhere.99.mlp")]

    with pytest.raises(PatchError, match="no module|Sites with that ending"):
        Broken(patch.config, patch.tensors).apply(base.model)
    assert torch.equal(run(base), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


@pytest.mark.parametrize("name", PROBES)
def test_all_mechanisms_of_a_family_share_one_batch(name):
    """Every row-wise mechanism is an arm of one base; each row gets its own and nobody else's."""
    mine = {key: m.make() for key, m in MEMBERS.items() if m.family == name}
    arms = {key: patch for key, patch in mine.items() if not pure_weights(patch)}
    base, probe = base_of(name), PROBES[name]
    many = {k: v[:1].expand(len(arms) + 1, *v.shape[1:]) for k, v in probe.inputs().items()}
    with apply(base.model, arms, root=base.root) as on, torch.inference_mode():
        names = [None, *arms]
        with on.rows(names):
            mixed = probe.read(base.model(**many))
        for i, key in enumerate(names):
            with on.rows([key] * len(names)):
                alone = probe.read(base.model(**many))
            torch.testing.assert_close(mixed[i], alone[i], atol=1e-5, rtol=1e-5)


# ---- language models ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def tiny_run(base):
    return base.model(input_ids=IDS).logits


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_row_its_arm(tiny_llm, text_patch, beams):
    rows_only(text_patch)
    how = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(IDS)}
    before = tiny_llm.model.generate(IDS, **how)
    with text_patch.apply(tiny_llm.model) as on:
        after = tiny_llm.model.generate(IDS, **how)
        with on.rows([None, ONLY, None, ONLY]):
            mixed = tiny_llm.model.generate(IDS, **how)
    assert torch.equal(mixed[::2], before[::2])
    assert torch.equal(mixed[1::2], after[1::2])


def test_cached_decoding_equals_the_full_forward(tiny_llm, text_patch):
    with text_patch.apply(tiny_llm.model):
        full = tiny_run(tiny_llm)
        with torch.inference_mode():
            from transformers import DynamicCache

            cache = DynamicCache(config=tiny_llm.model.config)
            parts = [tiny_llm.model(input_ids=IDS[:, :5], past_key_values=cache, use_cache=True).logits]
            for t in range(5, IDS.shape[1]):
                parts.append(tiny_llm.model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)


def test_left_padding_does_not_matter(tiny_llm, text_patch):
    with text_patch.apply(tiny_llm.model), torch.inference_mode():
        full = tiny_run(tiny_llm)
        pad = torch.zeros(4, 5, dtype=torch.long)
        mask = torch.cat([pad, torch.ones_like(IDS)], 1)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        padded = tiny_llm.model(input_ids=torch.cat([pad, IDS], 1), attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(padded[:, 5:], full, atol=1e-4, rtol=1e-4)


def test_running_batch_equals_each_row_alone(tiny_llm, text_patch):
    """Rows that join, leave and change slots get exactly what they would get alone."""
    rows_only(text_patch)
    prompts = [IDS[i % 4, : 4 + i].tolist() for i in range(9)]
    arms = ["a" if i % 3 else None for i in range(9)]
    rows = [
        Row(p, arm=a, max_tokens=4 + i, ignore_eos=True) for i, (p, a) in enumerate(zip(prompts, arms, strict=True))
    ]
    with apply(tiny_llm.model, {"a": text_patch}, root=tiny_llm.root) as on:
        Decoder(tiny_llm, on, slots=4).run(rows)
        for row in rows:
            text = torch.tensor([row.prompt + row.out])
            with on.rows([row.arm]), torch.inference_mode():
                want = tiny_llm.model(input_ids=text).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
            assert want.tolist() == row.out


def test_a_base_that_fails_mid_forward_recovers(tiny_llm, text_patch):
    """The inputs of a forward that raised must not leak into the next one."""
    with text_patch.apply(tiny_llm.model):
        want = tiny_run(tiny_llm)
        with pytest.raises((IndexError, RuntimeError)):
            tiny_llm.model(input_ids=torch.full((2, 3), 10_000))
        assert torch.equal(tiny_run(tiny_llm), want)
