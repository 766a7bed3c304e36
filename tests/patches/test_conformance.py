"""What must hold for EVERY mechanism, proved once for all of them."""

import pytest
import torch

from patches import artifact
from patches.engine.edits import Weight
from patches.engine.patch import ONLY, apply
from patches.families.llm.worker import Decoder, Row
from registry.errors import PatchError
from registry.systems import SYSTEMS
from tests.patches.members import MECHANISMS

IDS = torch.randint(3, 90, (4, 14), generator=torch.Generator().manual_seed(1))
IDS[:, 6:12] = IDS[:, 6:7]  # repeats, so that damping has something to damp
TOGETHER = [[None, "a", None, "a"], ["a", "a", None, None], [None, "a", "a", None], ["a"] * 4, [None] * 4]


@pytest.fixture(params=MECHANISMS)
def patch(request):
    return MECHANISMS[request.param]()


@torch.inference_mode()
def run(base, **more):
    return base.model(input_ids=IDS, **more).logits


def pure_weights(patch):
    return all(isinstance(e, Weight) for e in patch.edits())


def test_apply_changes_the_output(tiny_llm, patch):
    before = run(tiny_llm)
    with patch.apply(tiny_llm.model) as on:
        assert not torch.equal(run(tiny_llm), before)
        assert on.unreached() == []


def test_revert_is_bit_exact(tiny_llm, patch):
    before = run(tiny_llm)
    weights = {k: v.clone() for k, v in tiny_llm.model.state_dict().items()}
    patch.apply(tiny_llm.model).revert()
    assert torch.equal(run(tiny_llm), before)
    assert all(torch.equal(weights[k], v) for k, v in tiny_llm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llm.model.modules())


def test_strength_zero_is_the_base_bit_for_bit(tiny_llm, patch):
    before = run(tiny_llm)
    with patch.apply(tiny_llm.model, strength=0.0):
        assert torch.equal(run(tiny_llm), before)


def test_strength_between_lies_between(tiny_llm, patch):
    before = run(tiny_llm)
    with patch.apply(tiny_llm.model, strength=1e-3):
        little = run(tiny_llm)
    assert 0 < (little - before).abs().max() < 0.3


def test_fold_equals_apply(tiny_llm, patch):
    try:
        folded = patch.fold(tiny_llm.model)
    except PatchError as e:
        assert "hooks" in str(e)  # noqa: PT017  the refusal must name the alternative
        return
    with torch.inference_mode():
        alone = folded(input_ids=IDS).logits
    with patch.apply(tiny_llm.model):
        torch.testing.assert_close(alone, run(tiny_llm), atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())


def test_fold_refuses_a_patched_base(tiny_llm, patch):
    with patch.apply(tiny_llm.model), pytest.raises(PatchError, match="revert it|no weight form|no weights can"):
        patch.fold(tiny_llm.model)


@pytest.mark.parametrize("rows", TOGETHER, ids=str)
def test_a_mixed_batch_equals_the_separate_ones(tiny_llm, patch, rows):
    if pure_weights(patch):
        return
    before = run(tiny_llm)
    with apply(tiny_llm.model, {"a": patch}) as on:
        with on.rows(["a"] * 4):
            after = run(tiny_llm)
        with on.rows(rows):
            mixed = run(tiny_llm)
    for i, name in enumerate(rows):
        if name is None:
            assert torch.equal(mixed[i], before[i])
        else:
            torch.testing.assert_close(mixed[i], after[i], atol=1e-5, rtol=1e-5)


def test_strength_holds_per_row(tiny_llm, patch):
    if pure_weights(patch):
        return
    with apply(tiny_llm.model, {"a": patch}) as on:
        alone = {}
        for s in (0.0, 0.5, 1.0):
            with on.rows(["a"] * 4, [s] * 4):
                alone[s] = run(tiny_llm)
        with on.rows(["a"] * 4, [0.0, 0.5, 1.0, 0.5]):
            mixed = run(tiny_llm)
    for i, s in enumerate([0.0, 0.5, 1.0, 0.5]):
        torch.testing.assert_close(mixed[i], alone[s][i], atol=1e-5, rtol=1e-5)


def test_all_mechanisms_share_one_batch(tiny_llm):
    """Every row-wise mechanism is an arm of one base; each row gets its own and nobody else's."""
    arms = {name: make() for name, make in MECHANISMS.items() if not pure_weights(make())}
    ids = IDS[:1].expand(len(arms) + 1, -1)
    with apply(tiny_llm.model, arms) as on:
        names = [None, *arms]
        with on.rows(names), torch.inference_mode():
            mixed = tiny_llm.model(input_ids=ids).logits
        for i, name in enumerate(names):
            with on.rows([name] * len(names)), torch.inference_mode():
                alone = tiny_llm.model(input_ids=ids).logits
            torch.testing.assert_close(mixed[i], alone[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_row_its_arm(tiny_llm, patch, beams):
    if pure_weights(patch):
        return
    how = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(IDS)}
    before = tiny_llm.model.generate(IDS, **how)
    with patch.apply(tiny_llm.model) as on:
        after = tiny_llm.model.generate(IDS, **how)
        with on.rows([None, ONLY, None, ONLY]):
            mixed = tiny_llm.model.generate(IDS, **how)
    assert torch.equal(mixed[::2], before[::2])
    assert torch.equal(mixed[1::2], after[1::2])


def test_cached_decoding_equals_the_full_forward(tiny_llm, patch):
    with patch.apply(tiny_llm.model):
        full = run(tiny_llm)
        with torch.inference_mode():
            from transformers import DynamicCache

            cache = DynamicCache(config=tiny_llm.model.config)
            parts = [tiny_llm.model(input_ids=IDS[:, :5], past_key_values=cache, use_cache=True).logits]
            for t in range(5, IDS.shape[1]):
                parts.append(tiny_llm.model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)


def test_left_padding_does_not_matter(tiny_llm, patch):
    with patch.apply(tiny_llm.model), torch.inference_mode():
        full = run(tiny_llm)
        pad = torch.zeros(4, 5, dtype=torch.long)
        mask = torch.cat([pad, torch.ones_like(IDS)], 1)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        padded = tiny_llm.model(input_ids=torch.cat([pad, IDS], 1), attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(padded[:, 5:], full, atol=1e-4, rtol=1e-4)


def test_running_batch_equals_each_row_alone(tiny_llm, patch):
    """Rows that join, leave and change slots get exactly what they would get alone."""
    if pure_weights(patch):
        return
    prompts = [IDS[i % 4, : 4 + i].tolist() for i in range(9)]
    arms = ["a" if i % 3 else None for i in range(9)]
    rows = [
        Row(p, arm=a, max_tokens=4 + i, ignore_eos=True) for i, (p, a) in enumerate(zip(prompts, arms, strict=True))
    ]
    with apply(tiny_llm.model, {"a": patch}, root=tiny_llm.root) as on:
        Decoder(tiny_llm, on, slots=4).run(rows)
        for row in rows:
            text = torch.tensor([row.prompt + row.out])
            with on.rows([row.arm]), torch.inference_mode():
                want = tiny_llm.model(input_ids=text).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
            assert want.tolist() == row.out


def test_threads_never_get_each_others_arm(tiny_llm, patch):
    if pure_weights(patch):
        return
    import random
    from concurrent.futures import ThreadPoolExecutor

    before = run(tiny_llm)
    with apply(tiny_llm.model, {"a": patch}) as on:
        with on.rows(["a"] * 4):
            after = run(tiny_llm)

        def call(seed):
            names = random.Random(seed).choices([None, "a"], k=4)
            with on.rows(names):
                got = run(tiny_llm)
            return all(
                torch.allclose(got[i], (after if n else before)[i], atol=1e-5, rtol=1e-5) for i, n in enumerate(names)
            )

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(call, range(64)))


def test_save_and_load_round_trip(tiny_llm, tmp_path, patch):
    row = next((r for r in SYSTEMS.values() if r.patch and r.patch.endswith(f":{type(patch).__name__}")), None)
    if row is None:
        return  # only shipped mechanisms have a row in the table
    about = artifact.save(patch, row.name, tmp_path / "a", base=tiny_llm.label)
    again, loaded = artifact.load(tmp_path / "a", digest=about.digest, base=tiny_llm.digest)
    assert again == about
    assert loaded.config == patch.config
    with patch.apply(tiny_llm.model):
        want = run(tiny_llm)
    with loaded.apply(tiny_llm.model):
        assert torch.equal(run(tiny_llm), want)


def test_a_failed_apply_leaves_nothing_behind(tiny_llm, patch):
    from dataclasses import replace

    before = run(tiny_llm)

    class Broken(type(patch)):
        def edits(self):
            return [*super().edits(), replace(super().edits()[-1], site="model.layers.99.mlp.down_proj")]

    with pytest.raises(PatchError, match="Sites with that ending"):
        Broken(patch.config, patch.tensors).apply(tiny_llm.model)
    assert torch.equal(run(tiny_llm), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llm.model.modules())


def test_a_base_that_fails_mid_forward_recovers(tiny_llm, patch):
    """The inputs of a forward that raised must not leak into the next one."""
    with patch.apply(tiny_llm.model):
        want = run(tiny_llm)
        with pytest.raises((IndexError, RuntimeError)):
            tiny_llm.model(input_ids=torch.full((2, 3), 10_000))
        assert torch.equal(run(tiny_llm), want)
