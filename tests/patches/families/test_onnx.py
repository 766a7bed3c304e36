"""ONNX Runtime as every family uses it."""

from pathlib import Path

import pytest

from patches.families import onnx
from patches.families.clip.towers import Towers
from patches.families.video.onnx import Engine
from registry.errors import NotReady


class Replaced:
    """A session whose provider did not start: ONNX Runtime says nothing and takes the CPU's."""

    def __init__(self, *_, **__):
        pass

    def get_providers(self):
        return ["CPUExecutionProvider"]


@pytest.mark.parametrize("made", [Towers, Engine, lambda folder, how: onnx.session(folder / "x.onnx", how)])
def test_a_provider_that_is_replaced_without_a_word_is_refused(monkeypatch, tmp_path, made):
    import onnxruntime as ort

    monkeypatch.setattr(ort, "InferenceSession", Replaced)
    monkeypatch.setattr(onnx, "check_provider", lambda _: None)
    with pytest.raises(NotReady, match="could not start CUDAExecutionProvider"):
        made(tmp_path, "cuda")
    made(tmp_path, "cpu")


def test_a_provider_that_is_none_is_named():
    with pytest.raises(NotReady, match="no provider 'tpu' here"):
        onnx.session(Path("x.onnx"), "tpu")
