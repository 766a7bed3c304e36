import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patches import artifact
from patches.export import export
from patches.families import llm
from patches.families.llm.fold import _check_parity, _logits, _probe
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry import cli, manifest
from registry.errors import Conflict, PatchError, WrongBase
from registry.home import home as place

EVERYWHERE = SinkConfig(neurons=((0, 1), (0, 7), (1, 3), (2, 5)), keep_first=False)
BY_POSITION = SinkConfig(neurons=((0, 1),))


@pytest.fixture
def sealed(tmp_path, tiny_llm):
    def make(config, name="sealed"):
        folder = tmp_path / name
        artifact.save(SinkEdit(config, {}), "attention_sink", folder, base=tiny_llm.label)
        return folder

    return make


def test_the_checkpoint_answers_like_the_patch_and_needs_none_of_us(sealed, tiny_llm):
    folder = export(sealed(EVERYWHERE))
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = tokenizer("the same again and again and again", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        alone, base = model(input_ids=ids).logits, tiny_llm.model(input_ids=ids).logits
        with SinkEdit(EVERYWHERE, {}).apply(tiny_llm.model, root=tiny_llm.root):
            hooked = tiny_llm.model(input_ids=ids).logits
    torch.testing.assert_close(alone, hooked, atol=1e-5, rtol=1e-5)
    assert (alone - base).abs().max() > 0.01


def test_the_checkpoint_is_sealed_with_its_parent_and_exporting_again_is_the_same(sealed, tiny_llm, tmp_path):
    patch = sealed(EVERYWHERE)
    folder = export(patch)
    about = manifest.read(folder, base=tiny_llm.digest)
    assert (about.kind, about.system) == ("model", "attention_sink")
    assert about.parents == [manifest.read(patch).digest]
    assert folder.parent == place() / "exports"
    assert "model.safetensors" in about.files
    assert export(patch) == folder
    elsewhere = export(patch, tmp_path / "deep" / "elsewhere")
    assert manifest.read(elsewhere).digest == about.digest
    assert {f.name for f in folder.parent.iterdir()} == {folder.name}


def test_the_base_is_left_as_it_was(sealed, tiny_llm):
    weights = {k: v.clone() for k, v in tiny_llm.model.state_dict().items()}
    export(sealed(EVERYWHERE), base=tiny_llm)
    assert all(torch.equal(weights[k], v) for k, v in tiny_llm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llm.model.modules())


def test_a_patch_without_a_weight_form_is_refused_with_the_way_out(sealed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PatchError, match="serve it with hooks"):
        export(sealed(BY_POSITION), out)
    assert not out.exists()


def test_another_base_is_refused(sealed):
    with pytest.raises(WrongBase, match="Fit it again"):
        export(sealed(EVERYWHERE), base="tiny:1")


def test_what_lies_at_out_is_never_written_over(sealed, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(Conflict, match="Name another"):
        export(sealed(EVERYWHERE), out)
    other = sealed(SinkConfig(neurons=((0, 2),), keep_first=False), "other")
    export(sealed(EVERYWHERE), tmp_path / "taken")
    with pytest.raises(Conflict, match="not an export of"):
        export(other, tmp_path / "taken")
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_answers_otherwise_is_refused(tiny_llm):
    ids = _probe(tiny_llm)
    want = _logits(tiny_llm, ids)
    _check_parity(tiny_llm, ids, want)
    with pytest.raises(PatchError, match="differs from the hooked base"):
        _check_parity(llm.tiny(1), ids, want)
    with pytest.raises(PatchError, match="differs from the hooked base by nan"):
        _check_parity(tiny_llm, ids, want * float("nan"))


def test_the_verb_exports_what_was_fitted(sealed, capsys):
    digest = manifest.read(sealed(EVERYWHERE)).digest
    (place() / "runs").mkdir()
    sealed(EVERYWHERE).rename(place() / "runs" / f"attention_sink-{digest[:16]}")
    assert cli.main(["export", f"sha256:{digest}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(place() / "exports" / f"attention_sink-{digest[:16]}")
    assert cli.main(["export", "attention_sink"]) == 1
    assert "is the base itself, which is no artifact" in capsys.readouterr().err
