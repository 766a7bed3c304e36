from dataclasses import dataclass, field

import pytest

from registry.config import STRICT, override, parse
from registry.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    __pydantic_config__ = STRICT
    lr: float = 1e-3


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = STRICT
    site: str = "a"
    k: int = 32
    optim: Optim = field(default_factory=Optim)


def test_words_reach_into_nested_configs():
    got = override(Config(), ["k=8", "optim.lr=3e-4", "site=block"])
    assert got == Config("block", 8, Optim(3e-4))


@pytest.mark.parametrize(
    ("word", "says"),
    [("kk=8", "kk"), ("k=abc", "k.*abc"), ("k", "not key=value"), ("k.x=1", "has no fields"), ("optim.lr=nan", "lr")],
)
def test_a_word_that_does_not_fit_is_named(word, says):
    with pytest.raises(ConfigError, match=says):
        override(Config(), [word])


def test_values_from_a_manifest_round_trip():
    assert parse(Config, {"site": "b", "k": 1, "optim": {"lr": 2.0}}) == Config("b", 1, Optim(2.0))
