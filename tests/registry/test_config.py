import shlex
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
    layers: tuple[int, ...] = (4,)
    ranks: tuple[str, ...] = ()


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


@pytest.mark.parametrize(
    ("word", "way", "meant"),
    [("layers=3,4", "layers='[3, 4]'", (3, 4)), ("layers=4", "layers='[4]'", (4,)), ("ranks=a,b", "", ("a", "b"))],
)
def test_a_list_that_is_none_is_shown_as_it_is_written(word, way, meant):
    with pytest.raises(ConfigError) as e:
        override(Config(), [word])
    said = str(e.value).split("A list is written ")[1].rstrip(".")
    assert way in said
    (typed,) = shlex.split(said)  # as a shell hands it on
    assert getattr(override(Config(), [typed]), word.split("=")[0]) == meant


def test_values_from_a_manifest_round_trip():
    assert parse(Config, {"site": "b", "k": 1, "optim": {"lr": 2.0}}) == Config("b", 1, Optim(2.0))


@pytest.mark.parametrize("text", ['[{name = "a"}, {name = "b"}]', '[{"name": "a"}, {"name": "b"}]'])
def test_tables_of_a_word_are_toml_or_json(text):
    from registry.ab.experiment import Metric, begin

    made = begin("clip_sae", control="base", treatment="a" * 64, share=0.5, words=[f"also={text}"])
    assert made.also == (Metric("a"), Metric("b"))
    with pytest.raises(ConfigError, match="also"):
        begin("clip_sae", control="base", treatment="a" * 64, share=0.5, words=['also=[{"name": "a"'])
