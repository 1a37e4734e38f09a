"""A tiny Llama with a tokenizer of whole words, as a model directory: made in a moment, nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch

_MARKS = ["<s>", "</s>", "<unk>"]
_NOUNS = ["cat", "dog", "home", "house", "it", "his"]
_OTHERS = ["the", "a", "sees", "finds", "and", "then", "runs", "to", "red", "blue", "old", "was", ".", ","]
WORDS = [*_MARKS, *_NOUNS, *_OTHERS]
CONTEXT = 32


def save_llama(folder: Path, seed: int = 0, **changed: Any) -> Path:
    """Two blocks of width 16, four heads of which two share keys, context 32, tied embeddings."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, **changed,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Words and marks, `<s>` in front."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def text_of(words: int, seed: int = 0) -> str:
    """So many words, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, len(WORDS), (words,), generator=generator)
    return " ".join(WORDS[i] for i in drawn.tolist())
