import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry import cli
from registry.systems import SYSTEMS
from registry.verbs import decide, records
from registry.verbs import said as saying

ROOT = Path(__file__).parent.parent.parent


def run(capsys, *words):
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_set_of_verbs_is_frozen():
    """Verbs are a budget: a new one needs a decision, not a commit."""
    assert list(cli.VERBS) == [
        "systems", "fit", "eval", "gate", "push", "pull", "list", "show", "compare", "split", "report",
        "promote", "rollback", "sign", "verify", "audit", "serve", "ui", "up", "doctor", "build", "bench", "export",
        "import",
    ]  # fmt: skip


def test_systems_lists_every_row_and_answers_programs(capsys):
    code, out, _ = run(capsys, "systems", "--json")
    assert code == 0
    assert [s["name"] for s in json.loads(out)["systems"]] == list(SYSTEMS)


def test_a_planned_system_says_so_plainly(capsys):
    planned = next((n for n, s in SYSTEMS.items() if s.planned), None)
    if planned is None:
        return
    code, out, err = run(capsys, "fit", planned)
    assert (code, out) == (1, "")
    assert "planned" in err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("fit", "nonsense"), 1, "There is no system 'nonsense'"),
        (("report", "nonsense"), 2, "There is no system"),
        (("report", "attention_sink"), 1, "has had no experiment"),
        (("rollback", "attention_sink"), 1, "nothing to roll back"),
        (("pull", "attention_sink@challenger"), 1, "no challenger"),
        (("pull", "sha256:zz"), 2, "not a digest"),
        (("push", "/nowhere"), 1, "never sealed"),
    ],
)
def test_a_refusal_names_the_value_and_the_way_out(capsys, words, code, says):
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err


def test_words_that_make_no_sense_exit_with_2():
    assert (
        subprocess.run([sys.executable, "-m", "registry.cli", "dance"], capture_output=True, check=False).returncode
        == 2
    )


def test_the_table_in_the_readme_is_the_table():
    assert cli.readme_table() in (ROOT / "README.md").read_text()


def test_every_verb_the_readme_types_exists():
    import re

    typed = set(re.findall(r"^patchbay (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert typed <= set(cli.VERBS)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["0.1"], (None, 0.1, [])),
        (["attention_sink@3", "0.5"], ("attention_sink@3", 0.5, [])),
        (["0.5", "min_n=20", "tau=0.3"], (None, 0.5, ["min_n=20", "tau=0.3"])),
        (["sha256:abcdef12", "1", "promote_on_win=true"], ("sha256:abcdef12", 1.0, ["promote_on_win=true"])),
    ],
)
def test_split_takes_a_reference_a_share_and_settings(words, want):
    assert decide.split_words(cli.parser().parse_args(["split", "attention_sink", *words]).words) == want


@pytest.mark.parametrize("words", [["min_n=3"], ["x"], ["a", "b", "0.1"], ["1.5"], ["nan"], ["0.1", "0.2", "0.3"]])
def test_split_says_what_it_wants(capsys, words):
    code, out, err = run(capsys, "split", "attention_sink", *words)
    assert (code, out) == (2, "")
    assert "SHARE" in err


@pytest.mark.parametrize(
    ("system", "env", "says"),
    [
        ("clip_sae", {}, "no patch yet.*PATCHBAY_BASE, for instance to lab:clip"),
        ("clip_sae", {"PATCHBAY_BASE": "lab:clip", "PATCHBAY_PROVIDER": "tpu"}, "no provider 'tpu' here"),
        ("clip_sae", {"PATCHBAY_BASE": "lab:clip", "PATCHBAY_DEVICE": "cuda:99"}, "CUDA devices. Declare cpu"),
        ("attention_sink", {"PATCHBAY_BASE": "tiny", "PATCHBAY_PROVIDER": "cpu"}, "run in torch alone"),
        ("attention_sink", {"PATCHBAY_BASE": "local:mine"}, "PATCHBAY_BASE=local-dir"),
    ],
)
def test_a_service_that_cannot_start_is_refused_in_one_line(capsys, monkeypatch, system, env, says):
    """BentoML would start its worker again and again, each time with a traceback."""
    import torch  # noqa: F401  it starts a process of its own when it is imported

    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert cli.main(["serve", system, "--port", str(port)]) == 1
    told = capsys.readouterr().err
    assert re.search(says, told)
    assert told.count("\n") == 1


# ---- what no service could serve -----------------------------------------------------------------------------------


def sealed(folder, base, config=None, kind="patch"):
    """A sealed folder on `base` (its label), for a service that has it or not."""
    from patches import artifact
    from patches.mechanisms.sink import SinkConfig, SinkEdit
    from registry import manifest

    if kind == "patch":
        patch = SinkEdit(config or SinkConfig(neurons=((0, 1),)), {})
        return folder, artifact.save(patch, "attention_sink", folder, base=base).digest
    folder.mkdir(parents=True)
    return folder, manifest.write(folder, kind=kind, system="attention_sink", base=base, config={}).digest


def test_what_cannot_be_served_beside_the_champion_is_refused_unless_forced(capsys, tmp_path, home):
    """push, split and promote: another base, and a kind that is no arm."""
    from registry.ab.ledger import Ledger

    ours, other = "tiny:0@" + "a" * 64, "tiny:7@" + "b" * 64
    first, digest = sealed(tmp_path / "first", ours)
    assert run(capsys, "push", str(first))[0] == 0
    assert run(capsys, "promote", "attention_sink@challenger", "--force", "no recipe made it")[0] == 0
    for name, (folder, bad) in {
        "another base": sealed(tmp_path / "base", other),
        "another kind": sealed(tmp_path / "kind", ours, kind="search"),
    }.items():
        code, out, err = run(capsys, "push", str(folder))
        assert (code, out) == (1, ""), name
        assert "--force" in err
        assert Ledger().head("attention_sink").challenger is None
        assert run(capsys, "push", str(folder), "--force", "to see what happens")[0] == 0
        for words in (
            ("split", "attention_sink", "0.1"),
            ("split", "attention_sink", "@challenger", "0.1"),
            ("promote", f"sha256:{bad}"),
        ):
            code, _, err = run(capsys, *words)
            assert code == 1, (name, words)
            assert "could not serve" in err
        head = Ledger().head("attention_sink")
        assert (head.champion, head.challenger, head.experiment) == (digest, bad, None)
        # back to a challenger that can be served
        _, good = sealed(tmp_path / f"good-{name}", ours, None)
        assert good == digest
        assert run(capsys, "promote", f"sha256:{digest}", "--force", "it was there before")[0] == 0


@pytest.mark.parametrize(
    "words",
    ["eval mils --full seed=1", "eval mils seed=1 --full", "eval --full mils seed=1", "eval --json mils --full seed=1"],
)
def test_settings_may_stand_before_and_behind_flags(words):
    args = cli.parsed(words.split())
    assert (args.ref, args.full, args.words) == ("mils", True, ["seed=1"])
    assert cli.parsed(["fit", "mils/tiny", "--json", "seed=1", "items=2"]).words == ["seed=1", "items=2"]
    assert cli.parsed(["split", "mils", "0.1", "--force", "why", "margin=0.2"]).words == ["0.1", "margin=0.2"]


@pytest.mark.parametrize(
    "words", ["eval mils --full seed", "push folder seed=1", "eval mils --ful seed=1 --odd", "ui a=1"]
)
def test_words_that_mean_nothing_are_still_refused(words, capsys):
    with pytest.raises(SystemExit):
        cli.parsed(words.split())
    assert "usage" in capsys.readouterr().err


def test_a_comparison_of_what_is_not_measured_says_what_to_type(monkeypatch):
    empty = SimpleNamespace(compare=lambda a, b: SimpleNamespace(rows=[], url="http://mlflow.example"))
    monkeypatch.setattr(records, "the_store", lambda: empty)
    for name in ("resolve", "artifact"):
        monkeypatch.setattr(records, name, lambda ref: ref)
    said = records.compare(argparse.Namespace(a="mils@base", b="mils@challenger"))
    assert "Next: patchbay eval mils@challenger" in said.text


def test_who_decides_is_somebody(monkeypatch):
    monkeypatch.setenv("PATCHBAY_WHO", "ada")
    assert saying.who() == "ada"
    for name in ("PATCHBAY_WHO", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert saying.who() not in ("", "unknown")  # the password database's name

    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr(saying.getpass, "getuser", nobody)
    assert saying.who() == f"uid {os.getuid()}"


def test_a_reader_who_has_seen_enough_is_no_fault(monkeypatch, tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["systems"]) == 0


@pytest.mark.parametrize("words", ["eval", "bench", "export", "export --as card", "compare mils@base"])
def test_a_verb_that_needs_an_artifact_names_one_where_the_champion_is_the_base(words, monkeypatch, capsys):
    monkeypatch.setattr(saying, "resolve", lambda ref: "base")
    assert cli.main([*words.split(), "mils"]) == 1
    assert "mils is the base itself, which is no artifact. Name one: SYSTEM@challenger" in capsys.readouterr().err
