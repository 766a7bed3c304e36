"""Tiny language models for tests: a random one with all real interfaces, and one with a planted attention sink."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import nn

from patches.families.base import Base
from registry import manifest


def tiny(seed: int = 0, layers: int = 3, vocab: int = 97) -> Base:
    """Create a random Llama with a one-character tokenizer: under a second, offline, all real interfaces."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 32 + vocab - 3)]
    words = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][:1] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    return Base(f"tiny:{seed}", "tiny-llama", weights_digest(model), model, tokenizer, "model", "llm")


def planted(layer: int = 1, neuron: int = 7, by_bos: bool = False) -> Base:
    """Create a tiny model that repeats its input, with an attention sink built in by hand: a known ground truth.

    Every token has a sign (dimension 2) and a constant (3). Head 0 of layer 0 attends to all tokens uniformly and
    writes their mean sign (the mark, 0): text mixes signs, a lone or a repeated token does not. The planted neuron
    fires where the mark is above one half and writes a large vector (1), which the head reads as the end of the text.
    So copies of a word of sign +1 derail the model once they outnumber the prefix; silencing the neuron away from the
    first token repairs that, and so does damping. by_bos: the BOS embedding alone carries the mark.
    """
    base = tiny(seed=1)
    lm, tokenizer = base.model, base.processor
    plus = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"etosilcuf"])]
    with torch.no_grad():
        table = lm.model.embed_tokens.weight
        table[:, :2] = 0.0
        table[:, 2], table[plus, 2] = -1.0, 1.0
        table[:, 3] = 1.0
        lm.lm_head.weight[:] = 1.5 * table
        lm.lm_head.weight[:, :4] = 0.0
        lm.lm_head.weight[tokenizer.eos_token_id, 1] = 8.0
        for block in lm.model.layers:  # too small to matter, blind to the four dimensions
            for out in (block.self_attn.o_proj, block.mlp.down_proj):
                out.weight *= 0.1
                out.weight[:4] = 0.0
            for into in (
                *(getattr(block.self_attn, f"{n}_proj") for n in "qkv"),
                block.mlp.gate_proj,
                block.mlp.up_proj,
            ):
                into.weight[:, :4] = 0.0
        if by_bos:
            table[tokenizer.bos_token_id, 0] = 1.0
        else:
            attn = lm.model.layers[0].self_attn
            attn.q_proj.weight[: attn.head_dim] = 0.0
            attn.v_proj.weight[: attn.head_dim] = 0.0
            attn.v_proj.weight[0, 2] = 1.0
            attn.o_proj.weight[:, 0] = 0.0
            # a sign of 1 is about 3 after normalisation, so the mark is about the mean sign itself
            attn.o_proj.weight[0, 0] = 1.0 / 3.0
        mlp = lm.model.layers[layer].mlp
        mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0.0, 0.0
        mlp.gate_proj.weight[neuron, 0], mlp.gate_proj.weight[neuron, 3] = 20.0, -10.0
        mlp.up_proj.weight[neuron, 3] = 1.0
        mlp.down_proj.weight[:, neuron] = 0.0
        mlp.down_proj.weight[1, neuron] = 30.0
    return replace(base, ref="tiny:planted", name="tiny-planted", digest=weights_digest(lm))


TINIES = {"planted": planted}
"""tiny:<name> -> function that creates a small model for a purpose"""


def weights_digest(model: nn.Module) -> str:
    """Digest an in-memory model by the names, shapes and bytes of its parameters."""
    return manifest.digest_of(
        {
            k: [list(v.shape), hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()]
            for k, v in model.state_dict().items()
        }
    )
