"""The planted sink: found once, fitted once."""

from __future__ import annotations

import pytest

from patches.families import llm
from tests.training.attention_sink.some import TINY
from training import attention_sink as job
from training.attention_sink.find import find
from training.attention_sink.measure import fit_words


@pytest.fixture(scope="module")
def base():
    return llm.planted()


@pytest.fixture(scope="module")
def circuit(base):
    return find(base, fit_words(base, TINY)[:4], 100)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    return folder, job.fit(TINY, folder)
