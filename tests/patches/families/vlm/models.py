"""Tiny random checkpoints of every vision-language architecture, written in the hub's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

LETTERS = [chr(c) for c in range(32, 123)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>",
           "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>", "<end_of_utterance>",
           *[f"<row_{r}_col_{c}>" for r in range(1, 3) for c in range(1, 3)]]  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ m['role'][:1] + ':' }}{% for p in m['content'] %}"
    "{{ 'MARK' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def tokenizer(marks: bool = True) -> Any:
    words = {w: i for i, w in enumerate([*SPECIAL, *LETTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.add_special_tokens(SPECIAL)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                              "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
        if marks else None,
    )  # fmt: skip


def _id(token: str) -> int:
    return SPECIAL.index(token)


def _llama() -> Any:
    return tf.LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def _clip() -> Any:
    return tf.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip


def llava() -> tuple[Any, Any]:
    config = tf.LlavaConfig(vision_config=_clip(), text_config=_llama(), image_token_id=_id("<image>"),
                            vision_feature_layer=-2, image_seq_length=16)  # fmt: skip
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    hub = tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("MARK", "<image>"),
    )
    return tf.LlavaForConditionalGeneration(config), hub


def llava_next() -> tuple[Any, Any]:
    pins = [[32, 64], [64, 32], [64, 64]]
    config = tf.LlavaNextConfig(vision_config=_clip(), text_config=_llama(), image_token_id=_id("<image>"),
                                vision_feature_layer=-2, image_grid_pinpoints=pins)  # fmt: skip
    pictures = tf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
                                          image_grid_pinpoints=pins)  # fmt: skip
    hub = tf.LlavaNextProcessor(image_processor=pictures, tokenizer=tokenizer(), patch_size=8,
                                vision_feature_select_strategy="default", num_additional_image_tokens=1,
                                chat_template=CHAT.replace("MARK", "<image>"))  # fmt: skip
    return tf.LlavaNextForConditionalGeneration(config), hub


def idefics3(smol: bool = False) -> tuple[Any, Any]:
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    about = dict(vision_config=vision, text_config=_llama(), image_token_id=_id("<image>"), scale_factor=2)
    size = dict(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    chat = CHAT.replace("MARK", "<image>")
    if smol:  # its own processor wants num2words, for the numbers of video frames; what it writes is Idefics3's
        model = tf.SmolVLMForConditionalGeneration(tf.SmolVLMConfig(**about))
        pictures = tf.SmolVLMImageProcessor(**size)
        return model, tf.Idefics3Processor(
            image_processor=pictures, tokenizer=tokenizer(), image_seq_len=4, chat_template=chat
        )
    pictures = tf.Idefics3ImageProcessor(**size)
    hub = tf.Idefics3Processor(image_processor=pictures, tokenizer=tokenizer(), image_seq_len=4, chat_template=chat)
    return tf.Idefics3ForConditionalGeneration(tf.Idefics3Config(**about)), hub


def qwen(five: bool = False) -> tuple[Any, Any]:
    text = dict(vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
                bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4})  # fmt: skip
    ids = dict(image_token_id=_id("<|image_pad|>"), video_token_id=_id("<|video_pad|>"),
               vision_start_token_id=_id("<|vision_start|>"), vision_end_token_id=_id("<|vision_end|>"))  # fmt: skip
    if five:
        vision = dict(depth=2, hidden_size=24, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
                      out_hidden_size=32, fullatt_block_indexes=[1], window_size=16)  # fmt: skip
        model = tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
        )
    else:
        vision = dict(
            depth=2, embed_dim=24, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2
        )
        model = tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(vision_config=vision, text_config=text, **ids))
    pictures = tf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32)
    made = tf.Qwen2_5_VLProcessor if five else tf.Qwen2VLProcessor
    words = tokenizer()
    words.image_token, words.video_token = "<|image_pad|>", "<|video_pad|>"
    hub = made(image_processor=pictures, tokenizer=words,
               video_processor=tf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
               chat_template=CHAT.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"))  # fmt: skip
    return model, hub


def instructblip() -> tuple[Any, Any]:
    vision = dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    query = dict(vocab_size=200, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 encoder_hidden_size=24, cross_attention_frequency=1)  # fmt: skip
    config = tf.InstructBlipConfig(vision_config=vision, qformer_config=query, text_config=_llama().to_dict(),
                                   num_query_tokens=6, image_token_index=_id("<image>"))  # fmt: skip
    pictures = tf.BlipImageProcessor(size={"height": 32, "width": 32})
    words, asked = tokenizer(marks=False), tokenizer(marks=False)
    hub = tf.InstructBlipProcessor(
        image_processor=pictures, tokenizer=words, qformer_tokenizer=asked, num_query_tokens=6
    )
    return tf.InstructBlipForConditionalGeneration(config), hub


MODELS = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(smol=True),
    "qwen2_vl": qwen,
    "qwen2_5_vl": lambda: qwen(five=True),
    "instructblip": instructblip,
}


def write(name: str, folder: Path) -> Path:
    """A random checkpoint as `save_pretrained` writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, hub = MODELS[name]()
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained(folder)
    hub.save_pretrained(folder)
    if name == "smolvlm":
        for file in ("processor_config.json", "tokenizer_config.json"):
            about = (folder / file).read_text().replace("Idefics3Processor", "SmolVLMProcessor")
            (folder / file).write_text(about)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    return folder
