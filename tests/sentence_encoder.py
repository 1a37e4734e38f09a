"""A tiny random BERT with a tokenizer of whole words, as a model directory: made in a moment, nothing is downloaded."""

from pathlib import Path

import torch

_MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
NOUNS = ["cat", "dog", "house", "key", "value", "list", "file", "server"]
VERBS = ["finds", "returns", "opens", "holds", "reads", "writes"]
OTHERS = ["the", "a", "old", "new", "and", "then", "of", "to", "."]
WORDS = [*_MARKS, *NOUNS, *VERBS, *OTHERS]


def save_bert(folder: Path, seed: int = 0) -> Path:
    """Two blocks of width 32, four heads, 64 tokens at most."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Words, with marks on both sides."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """So many sentences, all different, of 8 to 16 words."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    found: dict[str, None] = {}
    while len(found) < count:
        parts = [
            f"the {pick(NOUNS)} {pick(VERBS)} a {pick(NOUNS)}"
            for _ in range(2 + int(torch.rand((), generator=generator) * 2))
        ]
        found[" and ".join(parts).capitalize() + "."] = None
    return list(found)
