"""Every model type that is let in decodes as its own library does: scores of prompts and answers, windows, caps and
scales, patched, too. A type that is not shown to is refused by its name."""

import math

import pytest
import torch

from patches.families import llm
from patches.families.llm.base import EAGER, TYPES
from patches.families.llm.worker import Decoder, Row
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry.errors import NotFound

WINDOW = 8
"""tokens; prompts are four times as long"""
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {kind: {"sliding_window": WINDOW} for kind in ("mistral", "ministral", "cohere2", "exaone4", "olmo3")}
GEMMAS = {kind: {"sliding_window": WINDOW, "query_pre_attn_scalar": 8} for kind in ("gemma2", "gemma3_text")}
MORE = WINDOWED | GEMMAS | {
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}  # fmt: skip


def checkpoint(kind, folder, tiny_llm, **more):
    """A random model of a type, saved as its library saves it, beside the tiny tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **MORE.get(kind, {}), **more))
    for p in model.parameters():
        if p.ndim > 1:  # the library's small start hides mistakes
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tiny_llm.processor.save_pretrained(folder)
    return model.eval()


def difference(base, arms=(None,), patched=None):
    """The largest difference of a log-probability between the running batch and the model's own forward."""
    prompts = [[5 + (i * 7) % 80 for i in range(4 * WINDOW)], [9, 10, 11]]
    rows = [Row(p, arm=a, max_tokens=12, ignore_eos=True, logprobs=0, score_prompt=True) for a in arms for p in prompts]
    Decoder(base, patched.applied if patched else None, slots=3).run(rows)
    worst = 0.0
    for row in rows:
        ids = torch.tensor([row.prompt + row.out])
        with torch.inference_mode():
            logits = (patched(rows=[row.arm], input_ids=ids) if patched else base.model(input_ids=ids)).logits[0]
        want = logits.float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        got = torch.tensor([s[0] for s in (*row.prompt_scores[1:], *row.scores)])
        worst = max(worst, float((got - want).abs().max()))
    return worst


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_that_is_let_in_decodes_as_its_own_library(kind, tiny_llm, tmp_path):
    own = checkpoint(kind, tmp_path, tiny_llm)
    base = llm.load(f"local-dir:{tmp_path}")
    ids = torch.arange(5, 35)[None]
    with torch.inference_mode():
        assert torch.allclose(own(input_ids=ids).logits, base.model(input_ids=ids).logits, atol=1e-4)
    patch = SinkEdit(SinkConfig(neurons=((1, 3), (2, 9)), damp_layers=(0,), damp_limit=2.0), {})
    patched = Subject(base, {"a": patch})
    assert difference(base, (None, "a"), patched) < 1e-4
    patched.close()
    limited = kind in WINDOWED or "sliding_window" in MORE.get(kind, {})
    assert limited == (Decoder(base).window is not None)


@pytest.mark.parametrize(("field", "kind"), [("window", "mistral"), ("scale", "granite"), ("cap", "gemma2"),
                                             ("scale", "cohere"), ("adds", "gemma2")])  # fmt: skip
def test_what_a_type_needs_would_be_missed(field, kind, tiny_llm, tmp_path, monkeypatch):
    """The test above sees it if the window, the scale or the cap were left out, as they were."""
    checkpoint(kind, tmp_path, tiny_llm)
    base, made = llm.load(f"local-dir:{tmp_path}"), Decoder.__init__

    def without(self, *a, **k):
        made(self, *a, **k)
        setattr(self, field, {"window": None, "scale": 1.0, "cap": None, "adds": False}[field])

    monkeypatch.setattr(Decoder, "__init__", without)
    assert not difference(base) < 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral", "opt", "mamba", "bert", "t5"])
def test_other_types_are_refused_by_name(kind, tiny_llm, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tiny_llm.processor.save_pretrained(tmp_path)
    with pytest.raises(NotFound, match=rf"type '{kind}'.*llama, mistral") as e:
        llm.load(f"local-dir:{tmp_path}")
    assert "\n" not in str(e.value)


def test_a_type_nobody_knows_is_refused(tiny_llm, tmp_path):
    checkpoint("llama", tmp_path, tiny_llm)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"llama9"'))
    with pytest.raises(NotFound, match="'llama9'"):
        llm.load(f"local-dir:{tmp_path}")


def test_half_precision_is_a_part_of_the_name(tiny_llm, tmp_path):
    from patches.families.base import load_base
    from registry.errors import ConfigError

    checkpoint("llama", tmp_path / "m", tiny_llm)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        base = load_base(f"local-dir:{tmp_path / 'm'}?dtype={name}", "llm")
        assert base.model.dtype == dtype
        assert base.label == f"local:m?dtype={name}@{base.digest}"
        row = Decoder(base).run([Row([5, 6, 7], max_tokens=3, logprobs=0, ignore_eos=True)])[0]
        assert len(row.out) == 3
        assert all(math.isfinite(s) for s, _ in row.scores)
        tiny = load_base(f"tiny:1?dtype={name}", "llm")
        assert (tiny.model.dtype, tiny.label.partition("@")[0]) == (dtype, f"tiny:1?dtype={name}")
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        load_base("tiny?dtype=int4", "llm")
    assert set(EAGER) <= set(TYPES)
