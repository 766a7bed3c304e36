"""No code of a model's folder runs, and nothing asks on the terminal whether it may."""

import json

import pytest

from patches.families import llm
from registry.errors import NotFound

EVIL = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nclass Evil: pass\n"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["a type that transformers has", "a type of its own"])
def test_a_folder_that_brings_code_runs_none_and_asks_nothing(tiny_llm, tmp_path, monkeypatch, where, known):
    folder = tmp_path / "m"
    tiny_llm.model.save_pretrained(folder)
    tiny_llm.processor.save_pretrained(folder)
    about = json.loads((folder / where).read_text())
    evil = "evil.Evil"
    about["auto_map"] = {"AutoConfig": evil, "AutoModelForCausalLM": evil, "AutoTokenizer": [evil, evil]}
    if not known:
        about["model_type" if where == "config.json" else "tokenizer_class"] = "evil"
    (folder / where).write_text(json.dumps(about))
    (folder / "evil.py").write_text(EVIL)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if known:
        assert llm.load(f"local-dir:{folder}").name == "m"
    else:
        with pytest.raises(NotFound, match="of type 'evil'|contains custom code"):
            llm.load(f"local-dir:{folder}")
    assert not list(tmp_path.rglob("RAN"))
    assert asked == []
