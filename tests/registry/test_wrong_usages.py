"""Wrong usages and broken folders on the command line: each is refused in words that name the value, none with a
traceback, and none falls into the net for faults."""

import json
import shutil
from pathlib import Path

import pytest

from registry import cli, manifest
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger

SYSTEM = "attention_sink"
SHIPPED = Path(__file__).parents[2] / "patches" / "lab" / "sealed" / "mils"
DIGEST = "f" * 64


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for all: the store is made once."""
    with pytest.MonkeyPatch.context() as patch:
        where = tmp_path_factory.mktemp("wrong")
        patch.setenv("PATCHBAY_HOME", str(where / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        ledgers.promote(Ledger(), "toto", DIGEST)
        ledgers.challenge(Ledger(), "toto", "e" * 64)
        yield where


USAGES = """
dance
fit
fit nonsense
fit clip_sea
fit clip_sae/nonsense
fit clip_sae/
fit /
fit clip_sae/tiny nonsense
fit clip_sae/tiny nonsense=1
fit clip_sae/tiny seed=x
fit clip_sae/tiny seed=1.5
fit clip_sae/tiny gates.nonsense=1
fit clip_sae/tiny gates=1
fit clip_sae/tiny seed.deep=1
fit clip_sae/tiny =1
fit clip_sae/tiny task=nonsense
fit clip_sae/tiny base=nonsense
fit clip_sae/tiny base=local-dir:/nowhere
fit clip_sae/tiny data=/nowhere
fit clip_sae/tiny device=nonsense
fit clip_sae/tiny device=cuda:99
fit clip_sae/tiny layers=[99]
fit attention_sink/tiny base=gguf:/nowhere.gguf
fit attention_sink/tiny base=pypi:nonsense
fit attention_sink/tiny base=
fit mils/tiny scorer=nonsense
fit w2w/tiny population=nonsense
fit vlm_erasure/tiny base=local-dir:/nowhere
fit toto/tiny --nonsense
eval
eval nonsense
eval attention_sink@challenger
eval attention_sink@nonsense
eval attention_sink@0
eval attention_sink@99
eval sha256:zz
eval sha256:ffffffff
eval deadbeef
eval /nowhere
eval .
eval toto@champion
eval attention_sink@base
gate
gate attention_sink
gate attention_sink@base
gate sha256:ffffffffffffffff
gate toto@challenger
push
push /nowhere
push /dev/null
push attention_sink
pull attention_sink@base
pull toto@champion
list nonsense
show nonsense
show sha256:ffffffff
show toto@champion
compare attention_sink
compare attention_sink@base attention_sink@base
compare attention_sink@1 attention_sink@2
split attention_sink
split attention_sink 2
split attention_sink 0.1
split attention_sink 0
split nonsense 0.1
split attention_sink 0.1 nonsense=1
split toto 0.1 alpha=7
split toto sha256:ffffffff 0.1
split toto 0.1 --force
report attention_sink
report nonsense
promote attention_sink
promote nonsense
promote toto@challenger
promote toto --force
rollback attention_sink
rollback nonsense
serve
serve nonsense
serve clip_sae
serve clip_sae --port x
serve clip_sae --port 99999 --base lab:clip
serve clip_sae --device nonsense --base lab:clip
serve clip_sae --slots 0 --base lab:clip
serve clip_sae --slots x --base lab:clip
serve clip_sae --context -5 --base lab:clip
serve clip_sae --tokens /nowhere --base lab:clip
serve clip_sae --host 0.0.0.0 --base lab:clip
serve clip_sae --provider nonsense --base lab:clip
serve toto --device cuda:99
ui --port 99999
ui --port x
build nonsense
build attention_sink@challenger
build toto@champion
export nonsense
export attention_sink@base
export toto@champion
bench nonsense
bench attention_sink@7
build
sign
sign nonsense
sign attention_sink
sign toto@champion --key /nowhere.pem
verify nonsense
verify attention_sink@base
verify /nowhere --signer /nowhere.pub
audit nonsense
audit --nonsense
up
up nonsense
up toto --replicas x
up toto --replicas 0
up toto --port 99999
import
import /nowhere
import /dev/null
import . base=nonsense
import . nonsense
report attention_sink --html /nowhere/page.html
report attention_sink --judge nonsense
export attention_sink@base --as nonsense
serve attention_sink --dtype float32 --base tiny
serve attention_sink --workers 0 --base tiny
fit clip_sae/tiny varied=2
fit clip_sae/tiny varied=0.5 task=waterbirds
fit clip_sae/tiny layers=3,4
fit attention_sink/tiny base=hf-hub:nobody/nothing
list --nonsense
pull nonsense
systems --nonsense
doctor now
"""


def refused(words, capsys, net=True):
    """The words of the refusal, after looking that it is one."""
    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as e:  # argparse
        code = e.code
    out, err = capsys.readouterr()
    assert code in (1, 2), (words, code, out)
    assert out == "", words
    assert "Traceback" not in err
    assert "has a fault" not in err, err
    told = [line for line in err.splitlines() if line.strip() and not line.startswith(("usage:", " "))]
    assert told, words
    assert len(told) == 1, err
    return told[0]


@pytest.mark.parametrize("line", USAGES.strip().splitlines())
def test_a_wrong_usage_is_refused_in_one_line(line, home, capsys, monkeypatch):
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("the service was started"))
    monkeypatch.setattr("training.run.progress.say", lambda _: None)
    monkeypatch.chdir(home)
    assert len(refused(line.split(), capsys)) > 20


def broken(name, folder):
    """A sealed folder with one thing wrong."""
    shutil.copytree(SHIPPED, folder)
    file = folder / manifest.NAME
    about = json.loads(file.read_text())
    some = next(iter(about["files"]))
    if name == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif name == "no manifest":
        file.unlink()
    elif name == "no JSON":
        file.write_text("{")
    elif name == "another JSON":
        file.write_text("[1, 2]")
    elif name == "a null":
        file.write_text(json.dumps({**about, "files": None}))
    elif name == "another schema":
        file.write_text(json.dumps({**about, "schema": 99}))
    elif name == "another kind":
        file.write_text(json.dumps({**about, "kind": "nonsense"}))
    elif name == "an unknown system":
        (folder / some).unlink()
        shutil.rmtree(folder)
        folder.mkdir()
        manifest.write(folder, kind="patch", system="nonsense", base=f"tiny@{DIGEST}", config={})
    elif name == "a missing file":
        (folder / some).unlink()
    elif name == "a flipped byte":
        (folder / some).write_bytes((folder / some).read_bytes()[:-1] + b"\0")
    elif name == "a stranger":
        (folder / "more.txt").write_text("x")
    elif name == "a link":
        (folder / some).unlink()
        (folder / some).symlink_to("/etc/hostname")
    elif name == "a folder for a file":
        (folder / some).unlink()
        (folder / some).mkdir()
    elif name == "a manifest that is a folder":
        file.unlink()
        file.mkdir()
    elif name == "no recipe":
        shutil.rmtree(folder)
        folder.mkdir()
        manifest.write(folder, kind="search", system="mils", bases=about["bases"], config=about["config"])
    elif name == "a recipe of nothing":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "recipe.json").write_text('{"recipe": "mils/lab", "config": {"nonsense": 1}}')
        manifest.write(folder, kind="search", system="mils", bases=about["bases"], config=about["config"])
    elif name == "a config of nothing":
        shutil.rmtree(folder)
        folder.mkdir()
        manifest.write(folder, kind="patch", system=SYSTEM, base=f"tiny:0@{DIGEST}", config={"nonsense": 1})
    return folder


BROKEN = (
    "empty", "no manifest", "no JSON", "another JSON", "a null", "another schema", "another kind", "an unknown system",
    "a missing file", "a flipped byte", "a stranger", "a link", "a folder for a file", "a manifest that is a folder",
    "a config of nothing",
)  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_every_verb_that_takes_one(name, home, tmp_path, capsys):
    folder = broken(name, tmp_path / "folder")
    for verb in ("push", "eval", "gate", "export", "build"):
        refused([verb, str(folder)], capsys)


@pytest.mark.parametrize("name", ["no recipe", "a recipe of nothing"])
def test_what_cannot_be_measured_is_refused(name, home, tmp_path, capsys):
    for verb in ("eval", "gate"):
        refused([verb, str(broken(name, tmp_path / verb))], capsys)


def test_the_sweep_is_long_enough():
    assert len(USAGES.strip().splitlines()) + 5 * len(BROKEN) >= 60


def test_what_nobody_foresaw_is_one_line_as_well_and_kept(home, capsys, monkeypatch):
    from registry.verbs import records

    def broken(*_):
        raise KeyError("something\nelse")

    monkeypatch.setitem(cli.VERBS, "list", broken)
    assert records.listing is not broken
    assert cli.main(["list"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "patchbay has a fault (KeyError" in told
    assert "test_wrong_usages.py" in (home / "home" / "fault.txt").read_text()
