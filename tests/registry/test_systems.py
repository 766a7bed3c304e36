import pytest

from registry.errors import NotFound
from registry.systems import SYSTEMS, system


def test_the_ten_systems_are_there_in_order():
    assert list(SYSTEMS) == [
        "clip_sae", "clip_heads", "second_order", "attention_sink", "vlm_erasure",
        "mils", "toto", "videomae", "w2w", "diffusion_cf",
    ]  # fmt: skip


def test_an_unknown_system_names_those_there_are():
    with pytest.raises(NotFound, match="attention_sink"):
        system("sink")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_string_of_a_row_resolves_or_says_planned(name):
    row = SYSTEMS[name]
    if row.planned:
        with pytest.raises(NotFound, match="planned"):
            row.load_job()
        return
    job = row.load_job()
    assert {"Config", "RECIPES", "fit", "evaluate"} <= set(vars(job))
    assert {"tiny", "paper"} <= set(job.RECIPES)
    if row.patch:
        assert row.load_patch().Config
