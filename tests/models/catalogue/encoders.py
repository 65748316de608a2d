"""Tiny language models as text encoders, each with a tokenizer of letters."""

from __future__ import annotations

from typing import Any

from tests.models.pipelines import LETTERS, TEXT_WIDTH

_TEXT = "message['content'] if message['content'] is string else message['content'][0]['text']"
_TEMPLATE = f"{{% for message in messages %}}{{{{ {_TEXT} }}}}{{% endfor %}}"
_SMALL = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _letters(*special: str) -> dict[str, int]:
    return {word: code for code, word in enumerate([*special, *LETTERS, "Ġ", "▁"])}


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    words = _letters("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[], unk_token="<|endoftext|>", model_max_length=64)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def qwen(head: bool = False) -> tuple[Any, Any]:
    """Qwen 3, with or without its head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = qwen_tokenizer()
    layers = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer)}
    config = Qwen3Config(**{**_SMALL, **layers}, max_position_embeddings=512)
    return (Qwen3ForCausalLM if head else Qwen3Model)(config).eval(), tokenizer


def qwen_vision() -> tuple[Any, Any]:
    """Qwen 2.5 VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0}
    config = Qwen2_5_VLConfig(
        text_config={
            **_SMALL,
            "num_key_value_heads": 2,
            "rope_scaling": rope,
            "rope_theta": 1000000.0,
            "vocab_size": len(tokenizer),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer


def gemma() -> tuple[Any, Any]:
    """Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = _letters("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer = GemmaTokenizer(vocab=words, merges=[], model_max_length=64)
    config = Gemma2Config(
        **_SMALL, num_key_value_heads=2, head_dim=8, sliding_window=16, vocab_size=len(tokenizer)
    )
    return Gemma2Model(config).eval(), tokenizer


def bert() -> tuple[Any, Any]:
    """BERT."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = _letters("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = BertTokenizer(vocab=words, model_max_length=77)
    return BertModel(BertConfig(**_SMALL, vocab_size=len(tokenizer))).eval(), tokenizer
