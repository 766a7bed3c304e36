import json

import pytest

from registry.errors import ConfigError
from training import run, sweep


def test_a_grid_is_every_combination_and_brackets_hold_commas():
    assert sweep.grid(["a=1,2", "b=[3,4],[5]"]) == [
        ("a=1", "b=[3,4]"), ("a=1", "b=[5]"), ("a=2", "b=[3,4]"), ("a=2", "b=[5]"),
    ]  # fmt: skip
    assert sweep.grid([]) == [()]
    with pytest.raises(ConfigError, match="no setting"):
        sweep.grid(["seed"])
    with pytest.raises(ConfigError, match="at most"):
        sweep.grid([f"a={','.join('1' * 40)}", f"b={','.join('1' * 40)}"])


def test_words_that_make_no_sense_end_it_before_anything_is_fitted(home, monkeypatch):
    monkeypatch.setattr(run, "fit", None)
    with pytest.raises(ConfigError):
        list(sweep.sweep("attention_sink/tiny", ["seed=0,x"]))


def test_a_fit_that_fails_fails_alone_and_others_are_as_fitted_alone(home, monkeypatch, capsys):
    fit = run.fit

    def some(recipe, words):
        if "seed=1" in words:
            raise ConfigError("that seed is taken")
        return fit(recipe, words)

    monkeypatch.setattr(run, "fit", some)
    assert sweep.main(["attention_sink/tiny", "seed=0,1"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (second["digest"], second["error"]) == ("", "that seed is taken")
    assert first["digest"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_the_same_words_give_the_same_digests(home):
    pytest.importorskip("ray", reason="Ray comes with the extra `ray`")
    here = {t.words: t.digest for t in sweep.sweep("attention_sink/tiny", ["seed=0,1"])}
    there = {t.words: t.digest for t in sweep.sweep("attention_sink/tiny", ["seed=0,1"], "ray")}
    assert here == there
    assert all(here.values())
