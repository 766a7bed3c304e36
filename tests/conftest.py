"""Every test has its own home, no network but loopback, and tiny bases; the model is the mock."""

import os
import shutil
import socket
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="patchbay-tests-")  # read once per process; never the user's own

import pytest

SHARED = []
"""The bases that all tests of a process share"""


def pytest_unconfigure():
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder where this test's patchbay keeps things."""
    monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PATCHBAY_DB", raising=False)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """A test that reaches for the network fails at once, and says for what."""
    connect = socket.socket.connect

    def checked(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests reach only loopback, not {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL, started once; skips with the reason where there is none."""
    from tests.postgres import running

    with running() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_llm():
    """A random Llama with a tokenizer; tests must leave it bit for bit as it was."""
    from patches.families import llm

    SHARED.append(llm.tiny())
    return SHARED[-1]


@pytest.fixture(scope="session")
def tiny_clip():
    """A random CLIP with both towers and a tokenizer; tests must leave it bit for bit as it was."""
    from patches.families import clip

    SHARED.append(clip.tiny())
    return SHARED[-1]


@pytest.fixture(scope="module", autouse=True)
def bases_left_as_they_were():
    """The tests of a module revert what they apply; who forgets fails here, not as a riddle in another module.

    At the end of a module, since services that a module's fixture keeps open have patches applied between tests.
    """
    yield
    for base in SHARED:
        hooked = [at for at, m in base.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked, f"{base.name}: hooks were left at {hooked}"
        assert not vars(base.model).get("_applied"), f"{base.name}: a patch was left applied"


@pytest.fixture
def far(monkeypatch):
    """tests/far.py: a device that is none can be asked for."""
    from .far import everywhere

    with everywhere(monkeypatch):
        yield
