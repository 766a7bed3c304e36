"""What would run on a GPU, run without one: on a device that is none (tests/far.py), with the numbers of the CPU."""

import pytest
import torch
from safetensors.torch import load_file

from patches import artifact
from patches.devices import shared_out
from patches.engine.edits import Weight
from patches.engine.patch import apply
from patches.families import clip
from patches.families.base import load_base
from patches.families.clip.worker import Embedder, Picture
from patches.families.llm.base import _map
from patches.families.llm.worker import Decoder, Row
from registry import manifest
from registry.errors import ConfigError, NotReady
from registry.systems import SYSTEMS
from tests.patches.members import MECHANISMS
from training import run
from training.lab import clip as lab

from .far import FAR, There

IDS = torch.randint(3, 90, (4, 14), generator=torch.Generator().manual_seed(1))
IDS[:, 6:12] = IDS[:, 6:7]
READY = [name for name, row in SYSTEMS.items() if not row.planned]


def test_the_device_refuses_what_a_gpu_refuses(far):
    x = torch.randn(3, 4, device=FAR)
    assert isinstance(x @ x.T, There)
    assert (x + 1 + torch.tensor(2.0)).device.type == FAR
    assert x[torch.tensor([0, 2])].device.type == FAR
    with pytest.raises(RuntimeError, match="on the CPU beside"):
        x + torch.ones(4)
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    there = x.cpu()
    assert not isinstance(there, There)
    torch.testing.assert_close(there.to(FAR).cpu(), there)


def test_what_was_made_in_inference_mode_moves_as_well(far):
    """Tables that a service made first are inference tensors, and tests come in any order."""
    with torch._C._InferenceMode(True):  # `far` makes torch.inference_mode no_grad
        table = torch.arange(6.0).view(2, 3) * 1
    assert table.is_inference()
    there = table.to(FAR)
    assert isinstance(there, There)
    torch.testing.assert_close((there @ torch.ones(3, device=FAR)).cpu(), torch.tensor([3.0, 12.0]))


SPLIT = f"cpu,{FAR}"
"""Two devices, with a decoder's first layers on one and its last on the other"""


@pytest.mark.parametrize("device", [FAR, SPLIT])
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_works_where_the_model_is(far, tiny_llm, name, device):
    """The same answers on another device, and on a base that lies on two; FAR refuses what two GPUs would."""
    patch = MECHANISMS[name]()
    with torch.no_grad(), patch.apply(tiny_llm.model):
        want = tiny_llm.model(input_ids=IDS).logits
    base = load_base("tiny", "llm", device)
    assert {p.device.type for p in base.model.parameters()} == set(device.split(","))
    at = base.device.type
    assert at == device.split(",")[0]
    moved, ids = patch.to(at), IDS.to(at)
    with torch.no_grad(), moved.apply(base.model):
        torch.testing.assert_close(base.model(input_ids=ids).logits.cpu(), want, atol=1e-5, rtol=1e-5)
    if any(isinstance(e, Weight) for e in patch.edits()):
        return
    with torch.no_grad(), apply(base.model, {"a": moved}) as on, on.rows(["a", None, "a", "a"]):
        got = base.model(input_ids=ids).logits.cpu()
    torch.testing.assert_close(got[[0, 2, 3]], want[[0, 2, 3]], atol=1e-5, rtol=1e-5)


def test_a_running_batch_on_two_devices_says_what_one_does(far, tiny_llm):
    patch = MECHANISMS["sink-all"]()
    said = {}
    for device in ("cpu", SPLIT):
        base = load_base("tiny", "llm", device)
        rows = [Row(ids.tolist()[: 8 + 2 * i], arm=("a", None)[i % 2], max_tokens=6) for i, ids in enumerate(IDS)]
        with torch.no_grad(), apply(base.model, {"a": patch}, root=base.root) as on:
            worker = Decoder(base, on)
            worker.run(rows)
            said[device] = [r.out for r in rows], worker.proof("a").cpu()
        assert len({k.device.type for k in worker.cache.keys}) == len(device.split(","))
    assert said["cpu"][0] == said[SPLIT][0]
    torch.testing.assert_close(*(proof for _, proof in said.values()), atol=1e-5, rtol=1e-5)


def test_a_folder_is_loaded_straight_onto_the_devices_of_its_layers(tmp_path, tiny_llm):
    """`meta` holds no numbers, so what lies there was not put anywhere else first."""
    tiny_llm.model.save_pretrained(tmp_path)
    tiny_llm.processor.save_pretrained(tmp_path)
    places = _map(tmp_path, ("cpu", "meta"))
    layers = tiny_llm.model.config.num_hidden_layers
    assert {places[f"model.layers.{i}"] for i in range(layers)} == {"cpu", "meta"}
    assert (places["model.embed_tokens"], places["model.norm"]) == ("cpu", "meta")


def test_layers_are_shared_out_in_order_and_as_evenly_as_whole_layers_allow():
    for sizes in ([1.0] * 12, [8.0, *[1.0] * 6, 8.0], [1.0, 2.0]):
        for count in (1, 2, 3, 5):
            got = shared_out(sizes, count)
            assert got == sorted(got)
            assert set(got) <= set(range(count))
            loads = [sum(s for s, at in zip(sizes, got, strict=True) if at == d) for d in range(count)]
            assert max(loads) <= sum(sizes) / count + max(sizes)


@pytest.mark.parametrize(
    ("device", "says"),
    [("cpu,cpu", "twice"), ("cpu,nowhere", "names no device"), ("cpu,cuda:7", "CUDA devices"), ("cpu,", "no device")],
)
def test_devices_that_are_none_are_named(device, says):
    with pytest.raises((ConfigError, NotReady), match=says):
        load_base("tiny", "llm", device)


def test_a_family_that_lies_on_one_device_says_so():
    with pytest.raises(ConfigError, match="one device"):
        load_base("tiny", "clip", "cpu,cuda:0")


def tensors_of(folder):
    """file:name -> tensor of whatever is sealed there: a patch, or a model's weights; a search has none."""
    about = manifest.read(folder)
    if about.kind == "patch":
        return dict(artifact.load(folder)[1].tensors)
    return {f"{file}:{k}": v for file in about.tensors for k, v in load_file(folder / file).items()}


@pytest.mark.parametrize("name", READY)
def test_a_fit_on_a_device_chooses_what_one_on_the_cpu_does(far, name):
    folders = {device: run.fit(f"{name}/tiny", [f"device={device}"]) for device in ("cpu", FAR)}
    here, there = (tensors_of(f) for f in folders.values())
    assert there.keys() == here.keys()
    for key, want in here.items():
        torch.testing.assert_close(there[key], want, atol=1e-3, rtol=1e-3)
    got, want = run.evaluate(folders[FAR]), run.evaluate(folders["cpu"])
    for side in ("base", "patched"):
        there, here = ({k: m.value for k, m in x.sides[side].items()} for x in (got, want))
        assert there == pytest.approx(here, abs=1e-3), side
    assert run.report(folders[FAR]).tables


def test_pictures_are_embedded_where_the_model_is(far, tiny_clip):
    x = torch.randn(3, 3, 32, 32)
    base = load_base("tiny", "clip", FAR)
    with apply(base.model, {}, root=base.root) as on:
        done = Embedder(base, on).run([Picture(v) for v in x])
    got = torch.stack([p.out for p in done]).cpu()
    torch.testing.assert_close(got, clip.embed_images(tiny_clip, x), atol=1e-5, rtol=1e-5)


def test_tokens_are_decoded_where_the_model_is(far, tiny_llm):
    patch = MECHANISMS["features-zero"]()
    base = load_base("tiny", "llm", FAR)
    out = []
    for mine, one in ((tiny_llm, patch), (base, patch.to(FAR))):
        with apply(mine.model, {"a": one}, root=mine.root) as on:
            rows = [Row(IDS[i].tolist(), arm=arm, max_tokens=8, logprobs=2) for i, arm in enumerate((None, "a", "a"))]
            out.append([r.out for r in Decoder(mine, on, slots=4).run(rows)])
    assert out[0] == out[1]


def test_the_lab_model_is_trained_on_a_device(far, tmp_path):
    got = lab.main(["tiny", str(tmp_path / "there"), f"device={FAR}"])
    want = lab.main(["tiny", str(tmp_path / "here"), "device=cpu"])
    assert got.keys() == want.keys()
    one, other = (clip.load(f"local-dir:{tmp_path / name}") for name in ("there", "here"))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
