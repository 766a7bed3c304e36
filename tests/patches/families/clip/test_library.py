"""What stands in for torch's compiler while torchvision is imported, and who does not find timm."""

import importlib
import sys
import threading

import pytest

from patches.families.clip import library


def test_the_stand_in_answers_as_the_compiler_does():
    real = importlib.import_module(library.COMPILER)
    later = library._Later(library.COMPILER)
    assert later.is_compile_supported("cpu") == real.is_compile_supported("cpu")
    assert later.counters is real.counters
    with pytest.raises(AttributeError):
        _ = later.no_such_thing


def test_a_stand_in_gives_its_place_up_when_it_is_used(monkeypatch):
    real = importlib.import_module(library.COMPILER)
    later = library._Later(library.COMPILER)
    monkeypatch.setitem(sys.modules, library.COMPILER, later)
    monkeypatch.setattr(importlib, "import_module", lambda name: real if name not in sys.modules else later)
    assert later.counters is real.counters


def test_only_the_thread_that_imports_open_clip_misses_a_library():
    absent = library._Absent(("timm",))
    with pytest.raises(ModuleNotFoundError):
        absent.find_spec("timm", None)
    found = []
    other = threading.Thread(target=lambda: found.append(absent.find_spec("timm", None)))
    other.start()
    other.join()
    assert found == [None]
    assert absent.find_spec("torch", None) is None
