"""What others made comes in and goes out: adapters that peft and diffusers wrote, vectors, dictionaries; and
`patchbay import` says what anything is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bentos.runtime import Runtime, Settings
from patches import artifact, imports
from patches.adapters import DIFFUSERS
from patches.families import clip, llm
from patches.families.base import load_base
from patches.families.family import family
from patches.families.llm.worker import Row
from patches.sae_files import load_sae, save_sae
from patches.subject import Subject
from registry import cli, manifest, store
from registry.errors import BadArtifact, Conflict, NotFound, PatchbayError
from registry.systems import IMPORTS, SYSTEMS, system
from tests.bentos.conftest import dictionary

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def peft_adapter(tiny_llm, tmp_path):
    """A LoRA that peft itself saved, of several ranks and scales, and what the model answers with it."""
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"down_proj": 5}, use_rslora=True, task_type="CAUSAL_LM", base_model_name_or_path="org/tiny",
    )  # fmt: skip
    model = get_peft_model(deepcopy(tiny_llm.model), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": "org/tiny"}))
    with torch.inference_mode():
        return tmp_path / "adapter", model.eval()(input_ids=IDS).logits


def logits(base, patch):
    subject = Subject(base, {"a": patch})
    with torch.inference_mode():
        out = subject(rows=["a"], input_ids=IDS).logits
        plain = subject(rows=[None], input_ids=IDS).logits
    subject.close()
    return out, plain


def test_an_adapter_of_peft_comes_in_as_a_patch_and_goes_out_again(peft_adapter, tiny_llm, home, tmp_path, capsys):
    from copy import deepcopy

    from peft import PeftModel

    place, want = peft_adapter
    assert cli.main(["import", str(place)]) == 0
    assert "LoRA adapter of 9 modules, rank 3, of org/tiny" in capsys.readouterr().out
    assert cli.main(["import", str(place), "base=tiny", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["system"] == "added_llm"
    about, patch = artifact.load(said["folder"], base=tiny_llm.digest)
    assert about.digest == said["digest"]
    got, plain = logits(tiny_llm, patch)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, want, atol=1e-2)
    with torch.inference_mode():
        torch.testing.assert_close(patch.fold(tiny_llm.model)(input_ids=IDS).logits, want, atol=1e-4, rtol=1e-4)

    store.push(said["folder"])
    assert cli.main(["export", f"sha256:{about.digest}", "--as", "others", "--out", str(tmp_path / "out")]) == 0
    again = PeftModel.from_pretrained(deepcopy(tiny_llm.model), tmp_path / "out").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=IDS).logits, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(Conflict, match="exists already"):
        imports.send(said["folder"], tmp_path / "out")


def test_an_imported_adapter_is_pushed_served_and_compared_like_any_other(peft_adapter, home, capsys, tiny_llm):
    place, _ = peft_adapter
    assert cli.main(["import", str(place), "base=tiny", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert cli.main(["push", said["folder"]]) == 0
    assert cli.main(["promote", "added_llm@challenger"]) == 1  # no recipe here promises anything of it
    assert cli.main(["promote", "added_llm@challenger", "--force", "made and measured elsewhere"]) == 0
    runtime = Runtime(Settings("added_llm"))
    runtime.start()
    try:
        assert runtime.table.champion == said["digest"]
        rows = [Row([5, 6, 7], arm=arm, max_tokens=6, ignore_eos=True) for arm in (None, said["digest"])]
        runtime.run(rows)
        assert rows[0].out != rows[1].out
    finally:
        runtime.stop()
    with pytest.raises(NotFound, match="patchbay import FOLDER base=REF"):
        system("added_llm").load_job()
    assert not IMPORTS.keys() & SYSTEMS.keys()


def test_a_lora_of_diffusers_comes_in_and_goes_out(tmp_path):
    base = load_base("tiny:stable", "diffusion")
    g = torch.Generator().manual_seed(0)
    keys = [n for n, m in base.model.denoiser.named_modules() if n.endswith(("to_q", "to_v"))]
    state = {}
    for name in keys:
        weight = base.model.denoiser.get_parameter(f"{name}.weight")
        state[f"unet.{name}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=g)
        state[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], 2, generator=g)
    (tmp_path / "lora").mkdir()
    save_file(state, tmp_path / "lora" / DIFFUSERS)
    assert f"{len(keys)} modules, rank 2" in imports.look(tmp_path / "lora").text
    about = imports.bring(tmp_path / "lora", "tiny:stable", tmp_path / "sealed", "diffusion")
    assert about.system == "added_diffusion"
    _, patch = artifact.load(tmp_path / "sealed")
    folded = patch.fold(base.model)
    for name in keys:
        delta = state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
        was = base.model.denoiser.get_parameter(f"{name}.weight")
        torch.testing.assert_close(folded.denoiser.get_parameter(f"{name}.weight"), was + delta)
    assert "diffusers" in imports.send(tmp_path / "sealed", tmp_path / "out")
    again = load_file(tmp_path / "out" / DIFFUSERS)
    assert all(torch.allclose(again[k], v) for k, v in state.items())


@pytest.mark.parametrize("key", ["direction.{}", "{}", "model.layers.{}", "layer_{}", "blocks.{}.hook_resid_post"])
def test_steering_vectors_come_in_and_go_out(key, tiny_llm, tmp_path):
    g = torch.Generator().manual_seed(0)
    held = {key.format(i): torch.randn(32, generator=g) for i in (0, 2)}
    save_file(held, tmp_path / "calm.safetensors")
    assert "steering vectors of 2 layers, width 32" in imports.look(tmp_path / "calm.safetensors").text
    about = imports.bring(tmp_path / "calm.safetensors", "tiny", tmp_path / "sealed", amount=1.5)
    assert (about.system, about.config["vectors"]) == ("added_llm", ["model.layers.0", "model.layers.2"])
    _, patch = artifact.load(tmp_path / "sealed")
    got, _ = logits(tiny_llm, patch)
    layers = tiny_llm.model.model.layers

    def add(i):
        return layers[i].register_forward_hook(lambda _, __, out: out + 1.5 * held[key.format(i)])

    hooks = [add(0), add(2)]
    with torch.inference_mode():
        want = tiny_llm.model(input_ids=IDS).logits
    for h in hooks:
        h.remove()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(PatchbayError, match="no weights to be folded"):
        patch.fold(tiny_llm.model)
    imports.send(tmp_path / "sealed", tmp_path / "out")
    out = load_file(tmp_path / "out" / imports.VECTORS)
    assert out.keys() == {"direction.0", "direction.2"}
    torch.testing.assert_close(out["direction.2"], 1.5 * held[key.format(2)])


def test_what_is_another_bases_is_refused_by_name(peft_adapter, tiny_llm, tmp_path):
    place, _ = peft_adapter
    state = load_file(place / "adapter_model.safetensors")
    wrong = {k.replace("layers.0.", "layers.7."): v for k, v in state.items()}
    save_file(wrong, place / "adapter_model.safetensors")
    with pytest.raises(BadArtifact, match="layers.7.*another base"):
        imports.bring(place, "tiny", tmp_path / "a")
    save_file(
        {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in state.items()},
        place / "adapter_model.safetensors",
    )
    with pytest.raises(BadArtifact, match="another base"):
        imports.bring(place, "tiny", tmp_path / "a")
    save_file({"direction.9": torch.zeros(32)}, tmp_path / "v.safetensors")
    with pytest.raises(BadArtifact, match="names no layer"):
        imports.bring(tmp_path / "v.safetensors", "tiny", tmp_path / "a")
    save_file({"direction.1": torch.zeros(31)}, tmp_path / "v.safetensors")
    with pytest.raises(BadArtifact, match="31 numbers, this base 32"):
        imports.bring(tmp_path / "v.safetensors", "tiny", tmp_path / "a")
    about = place / "adapter_config.json"
    for change in ({"peft_type": "IA3"}, {"use_dora": True}):
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
        with pytest.raises(NotFound, match="LoRA alone is read"):
            imports.look(place)
    with pytest.raises(NotFound, match="Nothing is added to clip bases"):
        imports.bring(tmp_path / "v.safetensors", "tiny", tmp_path / "a", "clip")
    assert not (tmp_path / "a").exists()


def test_import_says_what_anything_is(tiny_llm, tiny_clip, tmp_path, home, capsys):
    tiny_llm.model.save_pretrained(tmp_path / "llm")
    tiny_llm.processor.save_pretrained(tmp_path / "llm")
    clip.save(tiny_clip, tmp_path / "clip")
    save_sae(dictionary(), tmp_path / "sae")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    shutil.copytree(clip.SHIPPED / "diffusion", tmp_path / "pipe")
    shutil.copytree(clip.SHIPPED / "sealed" / "w2w", tmp_path / "sealed")
    shutil.copytree(clip.SHIPPED / "clip-sae", tmp_path / "shipped")
    shutil.copytree(tmp_path / "llm", tmp_path / "converted")  # as what came from a GGUF lies in the cache
    manifest.write(tmp_path / "converted", kind="model", system="", base="", config={"gguf": "f" * 64})
    shutil.copytree(clip.SHIPPED / "video-toto", tmp_path / "toto")
    shutil.copytree(tmp_path / "llm", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    wants = {
        "toto": "family video: a video model", "mute": "has no tokenizer",
        "shipped": "sparse autoencoder of 2,048 jumprelu features", "converted": "family llm: a language model",
        "llm": "family llm: a language model of type llama, 3 layers of width 32", "clip": "family clip",
        "sae": "sparse autoencoder of 40 relu features of width 32", "m.gguf": "base=gguf:",
        "sealed": "sealed patch of w2w", "pipe": "family diffusion", "nothing": "There is nothing at",
    }  # fmt: skip
    capsys.readouterr()
    for name, says in wants.items():
        code = cli.main(["import", str(tmp_path / name)])
        out, err = capsys.readouterr()
        refused = name in ("nothing", "mute")
        assert says in (err if refused else out), name
        assert code == refused
        assert (out + err).count("\n") == 1
    digest, (former,) = llm.base.digests(tmp_path / "llm")
    text = imports.look(tmp_path / "llm").text
    assert digest[:16] in text
    assert f"before: {former[:16]}, which is equal" in text
    for name in ("empty", "deep/er", "odd"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x.json").write_text("{}")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "whisper"}')
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    for name, says in {"empty": "nothing that is known", "deep": "Name one of them", "odd": "'whisper'",
                       "odd.safetensors": "no adapter"}.items():  # fmt: skip
        assert cli.main(["import", str(tmp_path / name)]) == 1
        assert says in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "sae"), "colour=red"]) == 2
    assert cli.main(["import", str(tmp_path / "sae"), "base=tiny"]) == 1
    assert "sparse autoencoder" in capsys.readouterr().err


def test_a_sealed_dictionary_goes_out_in_saelens_layout(tmp_path, home, tiny_clip):
    from tests.bentos.conftest import seal_features

    digest = seal_features(tiny_clip, range(3))
    folder = home / "artifacts" / digest
    assert "SAELens" in imports.send(folder, tmp_path / "out")
    x = torch.randn(4, 32)
    assert torch.equal(load_sae(tmp_path / "out").encode(x), load_sae(folder / "sae").encode(x))
    about = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "metadata"} <= about.keys()


def test_every_family_that_something_is_added_to_has_its_row():
    for row in IMPORTS.values():
        assert row.name == f"added_{row.family}"
        assert "block" in family(row.family).sites or row.family == "diffusion"
