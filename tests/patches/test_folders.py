"""Folders that others made: whatever is wrong with one is a line that names it and the way out, and never random
weights; what shapes an output is in a base's digest."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bentos.runtime import Runtime, Settings
from patches import checkpoints
from patches.families import clip, llm, vlm
from patches.families.base import load_base
from patches.sae_files import load_sae, save_sae
from registry import cli, manifest
from registry.errors import NotFinite, NotFound, PatchbayError
from tests.bentos.conftest import dictionary

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


@pytest.fixture(scope="module")
def saved(tiny_llm, tiny_clip, tmp_path_factory):
    """family -> a folder as its library saves it."""
    root = tmp_path_factory.mktemp("folders")
    tiny_llm.model.save_pretrained(root / "llm")
    tiny_llm.processor.save_pretrained(root / "llm")
    clip.save(tiny_clip, root / "clip")
    tiny = vlm.tiny()
    tiny.model.save_pretrained(root / "vlm")
    tiny.processor.hub.save_pretrained(root / "vlm")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """folder(family): one that the test may spoil."""
    return lambda family: shutil.copytree(saved / family, tmp_path / family)


def weights(folder):
    return next(f for f in sorted(folder.glob("*.safetensors")) if "golden" not in f.name)


def config(folder, **changes):
    file = folder / "config.json"
    about = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in about.items() if v is not None}))


def rewrite(folder, change):
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), {"format": "pt"})


def only_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    weights(folder).unlink()


def cut(folder, keep=0.7):
    raw = weights(folder).read_bytes()
    weights(folder).write_bytes(raw[: int(len(raw) * keep)])


def sharded(folder):
    names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(load_file(weights(folder)))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")


def without_tokenizer(folder):
    for name in (*checkpoints.TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/model", "peft_type": "LORA"})
    )


def nan(folder):
    rewrite(folder, lambda t: t[sorted(t)[3]].view(-1)[:2].fill_(float("nan")))


def missing(folder):
    rewrite(folder, lambda t: t.pop(next(k for k in sorted(t) if "mlp" in k)))


def nested(folder):
    shutil.copytree(folder, folder / "model")
    for f in list(folder.iterdir()):
        if f.is_file():
            f.unlink()


BROKEN = {
    "weights are a Git LFS pointer": (lambda f: weights(f).write_bytes(POINTER), "git lfs pull"),
    "another file is a Git LFS pointer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "git lfs pull"),
    "the config is a Git LFS pointer": (lambda f: (f / "config.json").write_bytes(POINTER), "git lfs pull"),
    "weights are a pickle": (only_pickle, "pickle.*safetensors"),
    "weights are Flax's": (lambda f: weights(f).rename(f / "flax_model.msgpack"), "Flax"),
    "no weights": (lambda f: weights(f).unlink(), "safetensors"),
    "cut off": (cut, "cut off.*again"),
    "cut off in the header": (lambda f: cut(f, 0.001), "beginning.*again"),
    "empty": (lambda f: weights(f).write_bytes(b""), "again"),
    "an absurd header": (lambda f: weights(f).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "again"),
    "a page of HTML": (lambda f: weights(f).write_bytes(b"<!doctype html>" * 100), "no safetensors file"),
    "a download that did not finish": (
        lambda f: (f / "model.safetensors.incomplete").write_bytes(b""),
        "did not finish",
    ),
    "a shard is missing": (sharded, "lacks 1 of the 2 files"),
    "quantised": (lambda f: config(f, quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes.*GGUF"),
    "quantised by another": (lambda f: config(f, quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
    "no tokenizer": (without_tokenizer, "no tokenizer"),
    "a tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
    "an unknown type": (lambda f: config(f, model_type="futuron"), "futuron"),
    "no type": (lambda f: config(f, model_type=None), "type ''"),
    "an adapter": (adapter, "adapter of 'org/model'.*patchbay import"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "not JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "an impossible config": (lambda f: config(f, num_attention_heads=5), "cannot be read|fits"),
    "another size": (lambda f: config(f, intermediate_size=64), "cannot be read"),
    "a weight is missing": (missing, "no file has 1 of its weights.*random"),
    "half the layers are missing": (lambda f: config(f, num_hidden_layers=6), "no file has .*random"),
    "NaN": (nan, "NaN"),
    "one folder too high": (nested, "Did you mean local-dir:"),
    "a GGUF file": (lambda f: [(f / "config.json").rename(f / "x.gguf")], "gguf:"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_no_language_model_is_one_line_with_the_way_out(folder, what, capfd):
    spoil, says = BROKEN[what]
    spoil(place := folder("llm"))
    with pytest.raises(PatchbayError, match=says) as e:
        load_base(f"local-dir:{place}", "llm")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700
    assert e.value.__cause__ is None
    assert "Traceback" not in capfd.readouterr().err


SIBLINGS = {
    ("clip", "weights are a Git LFS pointer"), ("clip", "cut off"), ("clip", "empty"), ("clip", "a page of HTML"),
    ("clip", "a download that did not finish"), ("clip", "NaN"), ("clip", "a weight is missing"),
    ("vlm", "weights are a Git LFS pointer"), ("vlm", "weights are a pickle"), ("vlm", "cut off"), ("vlm", "quantised"),
    ("vlm", "no tokenizer"), ("vlm", "an adapter"), ("vlm", "a weight is missing"), ("vlm", "NaN"),
    ("vlm", "a shard is missing"), ("vlm", "a config that is no JSON"), ("vlm", "no config"),
}  # fmt: skip
SAYS = {"a weight is missing": "random|do not fit"}


@pytest.mark.parametrize(("family", "what"), sorted(SIBLINGS))
def test_so_are_folders_of_other_families(folder, family, what):
    spoil, says = BROKEN[what]
    spoil(place := folder(family))
    with pytest.raises(PatchbayError, match=SAYS.get(what, says)) as e:
        load_base(f"local-dir:{place}", family)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("family", ["diffusion", "video", "search"])
def test_a_pointer_and_nothing_at_all_are_named_in_every_family(family, tmp_path):
    for name in ("model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        file = tmp_path / name.partition("/")[0] / name
        file.parent.mkdir(parents=True)
        file.write_bytes(POINTER)
        with pytest.raises(NotFound, match="git lfs pull"):
            load_base(f"local-dir:{file.parent.parent if '/' in name else file.parent}", family)
        shutil.rmtree(tmp_path / name.partition("/")[0])
    with pytest.raises(PatchbayError) as e:
        load_base(f"local-dir:{tmp_path}", family)
    assert "\n" not in str(e.value)
    with pytest.raises(NotFound, match="no folder"):
        load_base(f"local-dir:{tmp_path / 'nowhere'}", family)


@pytest.mark.parametrize(("raw", "says"), [
    (POINTER, "git lfs pull"), (b"GGUF", "cannot be read"), (b"GGUF" + bytes(60), "cannot be read"),
    (b"PK\x03\x04 a zip", "no GGUF file"), (b"", "no GGUF file"),
])  # fmt: skip
def test_a_gguf_file_that_is_none_is_one_line(raw, says, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHBAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(NotFound, match=says) as e:
        load_base(f"gguf:{tmp_path / 'm.gguf'}", "llm")
    assert "\n" not in str(e.value)


DICTIONARIES = {
    "a pointer": (lambda f: (f / "sae_weights.safetensors").write_bytes(POINTER), "git lfs pull"),
    "a pointer for a config": (lambda f: (f / "cfg.json").write_bytes(POINTER), "git lfs pull"),
    "cut off": (lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x10" + bytes(30)), "again"),
    "a config that is no JSON": (lambda f: (f / "cfg.json").write_text("{"), "not JSON"),
    "NaN": (lambda f: rewrite(f, lambda t: t["b_enc"].fill_(float("nan"))), "NaN"),
    "words for numbers": (
        lambda f: (f / "cfg.json").write_text('{"architecture": "topk", "k": "many"}'),
        "cannot be read",
    ),
    "one folder too high": (nested, "There is one in"),
}


@pytest.mark.parametrize("what", DICTIONARIES)
def test_a_dictionary_that_is_none_is_one_line(what, tmp_path):
    save_sae(dictionary(), tmp_path / "sae")
    spoil, says = DICTIONARIES[what]
    spoil(tmp_path / "sae")
    with pytest.raises(PatchbayError, match=says) as e:
        load_sae(tmp_path / "sae")
    assert "\n" not in str(e.value)


def test_saelens_configs_with_nulls_and_booleans_and_gemma_scopes_arrays_are_read(tmp_path):
    sae, x = dictionary(), torch.randn(5, 32)
    save_sae(sae, tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    about = json.loads(file.read_text())
    names = ("normalize_activations", "finetuning_scaling_factor", "activation_fn", "k", "reshape_activations")
    more = ("activation_fn_kwargs", "rescale_acts_by_decoder_norm", "metadata", "architecture")
    booleans = ("normalize_activations", "reshape_activations", "finetuning_scaling_factor")
    relu = {"activation_fn_str": "relu", "activation_fn": None}
    for changed in (dict.fromkeys((*names, *more)), dict.fromkeys(booleans, False), relu):
        file.write_text(json.dumps(about | changed))
        assert torch.equal(load_sae(tmp_path / "sae").encode(x), sae.encode(x))
    file.write_text(json.dumps(about | {"normalize_activations": True}))
    assert load_sae(tmp_path / "sae").normalise == "norm"

    place = tmp_path / "gemma-scope" / "layer_20" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    t = {"W_enc": sae.encoder.T, "W_dec": sae.decoder, "b_enc": sae.bias, "b_dec": torch.randn(32)}
    np.savez(place / "params.npz", threshold=np.full(40, 0.3, np.float32), **{k: v.numpy() for k, v in t.items()})
    scope = load_sae(place)
    pre = x @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(scope.encode(x), pre * (pre > 0.3))
    torch.testing.assert_close(scope.decode(scope.encode(x), x), scope.encode(x) @ t["W_dec"] + t["b_dec"])
    assert scope.site == "blocks.20.hook_resid_post"
    with pytest.raises(NotFound, match="There is one in"):
        load_sae(tmp_path / "gemma-scope")
    np.savez(place / "params.npz", W_enc=np.array([object()], dtype=object))
    with pytest.raises(NotFound, match="cannot be read"):
        load_sae(place)


def test_the_command_line_and_a_service_end_with_that_line(folder, home, capsys):
    place = folder("llm")
    missing(place)
    assert cli.main(["fit", "attention_sink/tiny", f"base=local-dir:{place}"]) == 1
    said = capsys.readouterr()
    assert "random numbers" in said.err
    assert "Traceback" not in said.err + said.out
    runtime = Runtime(Settings("attention_sink", base=f"local-dir:{place}"))
    with pytest.raises(NotFound, match="random numbers"):
        runtime.start()
    assert "random numbers" in runtime.problem
    runtime.stop()


def test_a_folder_called_openai_is_judged_by_its_config(folder, tmp_path):
    place = folder("clip")
    (place / clip.GOLDEN).unlink()
    about = json.loads((place / clip.CONFIG).read_text())
    for quick in (False, True):
        about["model_cfg"]["quick_gelu"] = quick
        (place / clip.CONFIG).write_text(json.dumps(about))
        for name in ("my-openai-finetune", "vit.quickgelu"):
            place = place.rename(tmp_path / name)
            assert load_base(f"local-dir:{place}", "clip").model.config["model_cfg"]["quick_gelu"] is quick


# ---- what a digest sees -------------------------------------------------------------------------------------------


EDITS = {
    "chat template": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "generation config": lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, 7]}'),
    "tokenizer config": lambda f: (f / "tokenizer_config.json").write_text(
        json.dumps(json.loads((f / "tokenizer_config.json").read_text()) | {"clean_up_tokenization_spaces": True})
    ),
    "sentencepiece model": lambda f: (f / "tokenizer.model").write_bytes(b"\n\x05\n\x03abc"),
    "added tokens": lambda f: (f / "added_tokens.json").write_text('{"<x>": 96}'),
    "merges": lambda f: (f / "merges.txt").write_text("a b\n"),
    "preprocessor": lambda f: (f / "preprocessor_config.json").write_text('{"do_resize": false}'),
}


@pytest.mark.parametrize("what", EDITS)
def test_what_shapes_an_output_is_in_the_digest(folder, what):
    place = folder("llm")
    before, former = llm.base.digests(place)
    EDITS[what](place)
    after, same = llm.base.digests(place)
    assert before != after
    assert former == same  # the releases before saw no difference


def test_what_a_library_writes_of_itself_is_not_in_the_digest(folder):
    place = folder("llm")
    before = llm.base.digests(place)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = place / name
        more = {"transformers_version": "9.9", "_name_or_path": "/somewhere", "dtype": "float16"}
        file.write_text(json.dumps(json.loads(file.read_text()) | more, indent=7))
    (place / "README.md").write_text("hello")
    assert llm.base.digests(place) == before


def test_artifacts_of_the_digest_before_still_belong_to_their_base(folder, home, tmp_path):
    """The migration: a folder has a new digest, and what was sealed on the old one is read, served and pushed on."""
    from patches import artifact
    from patches.mechanisms.sink import SinkConfig, SinkEdit
    from patches.subject import Subject

    place = folder("llm")
    base = load_base(f"local-dir:{place}", "llm")
    (old,) = base.former
    assert old != base.digest
    patch = SinkEdit(SinkConfig(neurons=((0, 1), (1, 5))), {})
    about = artifact.save(patch, "attention_sink", tmp_path / "sealed", base=f"local:llm@{old}")
    assert manifest.read(tmp_path / "sealed", base=base.digest).digest == about.digest
    subject = Subject.load(tmp_path / "sealed", base)
    assert len(subject.arms) == 1
    subject.close()
    runtime = Runtime(Settings("attention_sink", base=f"local-dir:{place}", pinned=tmp_path / "sealed"))
    runtime.start()
    assert runtime.table.champion == about.digest
    runtime.stop()
    other = artifact.save(patch, "attention_sink", tmp_path / "other", base=f"local:llm@{'0' * 64}")
    assert not manifest.same_base(other.base_digest, base.digest)
    with pytest.raises(PatchbayError, match="was made from"):
        manifest.read(tmp_path / "other", base=base.digest)


def test_hashes_are_remembered_by_path_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHBAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints._Hashes, "known", None)
    file, hashed = tmp_path / "model.safetensors", []
    file.write_bytes(bytes(2 << 20))
    inner = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda f: hashed.append(f) or inner(f))
    want = checkpoints.remembered(file)
    assert checkpoints.remembered(file) == want == inner(file)
    monkeypatch.setattr(checkpoints._Hashes, "known", None)  # another process
    assert checkpoints.remembered(file) == want
    assert len(hashed) == 1
    file.write_bytes(bytes(2 << 20)[:-1] + b"\x01")
    assert checkpoints.remembered(file) == inner(file) != want
    assert len(hashed) == 2
    (tmp_path / "cache" / "hashes.json").write_text("broken")
    monkeypatch.setattr(checkpoints._Hashes, "known", None)
    assert checkpoints.remembered(file) == inner(file)


def test_weights_that_are_not_finite_are_refused_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        net = torch.nn.Linear(300, 300).to(dtype)
        net.weight.data.fill_(torch.finfo(dtype).max)  # their sum is not finite, and they are
        checkpoints.check_weights("large", net)
        net.weight.data[3, 4] = float("inf")
        with pytest.raises(NotFinite, match="1 of 90000 numbers of 'weight'"):
            checkpoints.check_weights("large", net)
