from registry.ab.experiment import ArmStats, Summary, begin
from registry.ab.picture import picture


def test_the_picture_shows_the_interval_narrow_and_the_evidence_grow():
    x = begin("clip_sae", control="base", treatment="a" * 64, share=0.5, words=["min_n=2"])
    seen = [
        Summary(
            ArmStats(units=n, calls=n, n=n, total=0.3 * n, squares=0.3 * n),
            ArmStats(units=n, calls=n, n=n, total=0.9 * n, squares=0.9 * n),
        )
        for n in (0, 10, 100, 1000)
    ]
    effect, evidence = picture(x, seen).axes
    band = effect.collections[0].get_paths()[0].get_extents()
    assert band.y0 < 0.6 < band.y1
    line = evidence.lines[0].get_ydata()
    assert len(line) == 3  # nothing is said before there is an outcome
    assert line[0] < line[1] <= line[2]


def test_an_experiment_without_outcomes_has_a_picture_too():
    x = begin("clip_sae", control="base", treatment="a" * 64, share=0.5)
    assert picture(x, []).axes
