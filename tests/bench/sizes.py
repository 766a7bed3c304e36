"""Real sizes on this machine: a random Llama of a billion parameters in bf16, and a random ViT-L/14, with peak memory
and time. `python -m tests.bench.sizes llama FOLDER` (or vit) makes the folder if it is missing, and measures.

Peak memory is the process's own (VmHWM, less the shared pages of mapped files where the kernel tells them apart).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30


def memory() -> dict[str, float]:
    """GiB this process holds now, its own pages and those of mapped files, and the most it held."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    names = {"own": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {k: round(int(said[v].split()[0]) * 1024 / GIB, 2) for k, v in names.items()}


def told(what: str, start: float, **more: Any) -> None:
    print(json.dumps({"what": what, "cpu_s": round(time.process_time() - start, 1), **more, **memory()}), flush=True)


def write_llama(folder: Path) -> None:
    """A random Llama of 1.0 billion parameters, bf16, in shards, without ever holding all of it."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from patches.families import llm

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    llm.tiny().processor.save_pretrained(folder)
    g, D, M = torch.Generator().manual_seed(0), config.hidden_size, config.intermediate_size
    kv = D // config.num_attention_heads * config.num_key_value_heads
    block = {
        "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, D), "mlp.gate_proj": (M, D), "mlp.up_proj": (M, D), "mlp.down_proj": (D, M),
    }  # fmt: skip
    where: dict[str, str] = {}

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        made = {k: torch.ones(n, dtype=torch.bfloat16) for k, n in shapes.items()}
        for x in made.values():
            if x.ndim > 1:
                x.normal_(0, 0.02, generator=g)
        save_file(made, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(made, name))

    ends = {"model.embed_tokens.weight": (32_000, D), "lm_head.weight": (32_000, D), "model.norm.weight": (D,)}
    shard("model-00000-of-00005.safetensors", ends)
    for part in range(4):
        layers: dict[str, tuple[int, ...]] = {}
        for i in range(5 * part, 5 * part + 5):
            at = f"model.layers.{i}."
            layers |= {f"{at}{k}.weight": s for k, s in block.items()}
            layers |= {f"{at}{k}.weight": (D,) for k in ("input_layernorm", "post_attention_layernorm")}
        shard(f"model-0000{part + 1}-of-00005.safetensors", layers)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def llama(folder: Path) -> None:
    from patches.families.base import load_base
    from patches.families.llm.worker import Decoder, Row
    from patches.mechanisms.sink import SinkConfig, SinkEdit
    from patches.subject import Subject

    if not folder.is_dir():
        write_llama(folder)
    for what in ("first load", "again: hashes are remembered"):
        start = time.process_time()
        base = load_base(f"local-dir:{folder}?dtype=bf16", "llm")
        told(what, start, parameters=sum(p.numel() for p in base.model.parameters()), label=base.label[:40])
    subject = Subject(
        base, {"a": SinkEdit(SinkConfig(neurons=((1, 11), (2, 12)), damp_layers=(0,), damp_limit=4.0), {})}
    )
    decoder = Decoder(base, subject.applied, kv_bytes=64 << 20)
    told("keys and values", time.process_time(), token_bytes=decoder.cache.token_bytes, context=decoder.context)
    prompts = [[5 + (7 * i + j) % 90 for i in range(96)] for j in range(2)]
    start = time.process_time()
    rows = [Row(p, arm=a, max_tokens=8, ignore_eos=True, logprobs=0) for p in prompts for a in (None, "a")]
    decoder.run(rows)
    held = sum(t.nbytes for t in (*decoder.cache.keys, *decoder.cache.values))
    told("4 rows of 96 + 8 tokens, base and patched", start, kv_mib=round(held / 2**20, 1))
    ids = torch.tensor([prompts[0] + rows[0].out])
    with torch.inference_mode():
        want = base.model(input_ids=ids).logits.float().log_softmax(-1)[0, 95:-1]
    got = [s for s, _ in rows[0].scores]
    worst = max(abs(g - float(want[t, rows[0].out[t]])) for t, g in enumerate(got))
    told("the same by the model's own forward", start, worst_nats=round(worst, 4))
    subject.close()


def vit(folder: Path) -> None:
    from open_clip import get_model_config

    from patches.families import clip
    from patches.families.base import load_base

    if not folder.is_dir():
        from safetensors.torch import save_file

        config = {"model_cfg": get_model_config("ViT-L-14"), "preprocess_cfg": {}}
        made = clip.new(config, seed=0)
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in made.model.state_dict().items()}, folder / clip.WEIGHTS)
        (folder / clip.CONFIG).write_text(json.dumps(made.model.config))
        return  # measured by another process, which never held the model twice
    for name in ("fp32", "bf16"):
        start = time.process_time()
        base = load_base(f"local-dir:{folder}?dtype={name}", "clip")
        told(f"load in {name}", start, parameters=sum(p.numel() for p in base.model.parameters()))
        pixels = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        start = time.process_time()
        out = clip.embed_images(base, pixels)
        told(f"4 pictures in {name}", start, norm=round(float(out.float().norm(dim=1).mean()), 4))
        del base


if __name__ == "__main__":
    {"llama": llama, "vit": vit}[sys.argv[1]](Path(sys.argv[2]))
