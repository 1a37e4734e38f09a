"""Tiny models of many architectures with random weights, and batches for them. Needs transformers, no network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**TEXT, "max_position_embeddings": 64}
VISION = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
PATCHES = {**VISION, "image_size": 16, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def ids(g: torch.Generator, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=g)


def text(g: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": ids(g)}


def pair(g: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": ids(g), "decoder_input_ids": ids(g, 5)}


def image(g: torch.Generator, size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=g)}


def _llama(t: Any) -> nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER))


def _qwen3(t: Any) -> nn.Module:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=4))


def _mistral(t: Any) -> nn.Module:
    return t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=4))


def _gemma3(t: Any) -> nn.Module:
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=4, layer_types=LAYERS))


def _phi3(t: Any) -> nn.Module:
    return t.Phi3ForCausalLM(t.Phi3Config(**DECODER, pad_token_id=0))


def _gpt2(t: Any) -> nn.Module:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def _opt(t: Any) -> nn.Module:
    sizes = {k: v for k, v in ENCODER.items() if k != "intermediate_size"}
    return t.OPTForCausalLM(t.OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0))


def _gpt_neox(t: Any) -> nn.Module:
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**ENCODER))


def _mixtral(t: Any) -> nn.Module:
    return t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=4))


def _qwen3_moe(t: Any) -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**DECODER, head_dim=4, **experts))


def _gpt_oss(t: Any) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return t.GptOssForCausalLM(t.GptOssConfig(**DECODER, **experts, head_dim=4, layer_types=LAYERS))


def _bert(t: Any) -> nn.Module:
    return t.BertForMaskedLM(t.BertConfig(**ENCODER))


def _roberta(t: Any) -> nn.Module:
    return t.RobertaForMaskedLM(t.RobertaConfig(**ENCODER, pad_token_id=1))


def _t5(t: Any) -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 4}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))


def _bart(t: Any) -> nn.Module:
    return t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, **SPECIAL, max_position_embeddings=32))


def _vit(t: Any) -> nn.Module:
    return t.ViTForImageClassification(t.ViTConfig(**PATCHES))


def _clip(t: Any) -> nn.Module:
    return t.CLIPModel(t.CLIPConfig(text_config={**ENCODER, **SPECIAL}, vision_config=PATCHES, projection_dim=8))


def _whisper(t: Any) -> nn.Module:
    sizes = {"max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8, "decoder_start_token_id": 1}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**SEQ2SEQ, **SPECIAL, **sizes))


def _mamba(t: Any) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4}
    return t.MambaForCausalLM(t.MambaConfig(**sizes))


def _resnet(t: Any) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes))


Batch = Callable[[torch.Generator], Any]

ARCHITECTURES: dict[str, tuple[Callable[[Any], nn.Module], Batch]] = {
    "Llama": (_llama, text),
    "Qwen3": (_qwen3, text),
    "Mistral": (_mistral, text),
    "Gemma3": (_gemma3, text),
    "Phi3": (_phi3, text),
    "GPT2": (_gpt2, text),
    "OPT": (_opt, text),
    "GPTNeoX": (_gpt_neox, text),
    "Mixtral": (_mixtral, text),
    "Qwen3Moe": (_qwen3_moe, text),
    "GptOss": (_gpt_oss, text),
    "Bert": (_bert, text),
    "Roberta": (_roberta, text),
    "T5": (_t5, pair),
    "Bart": (_bart, pair),
    "ViT": (_vit, image),
    "CLIP": (_clip, lambda g: {**text(g), **image(g)}),
    "Whisper": (
        _whisper,
        lambda g: {"input_features": torch.randn(2, 8, 40, generator=g), "decoder_input_ids": ids(g)},
    ),
    "Mamba": (_mamba, text),
    "ResNet": (_resnet, lambda g: image(g, 32)),
}


def build(name: str, batches: int = 3) -> tuple[Any, list[Any]]:
    """The model, in evaluation mode, and batches; global random state is left as it was. Skips without transformers."""
    transformers = pytest.importorskip("transformers", reason="tiny models of real architectures are built with it")
    transformers.logging.set_verbosity_error()
    make, batch = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(transformers).eval()
    g = torch.Generator().manual_seed(1)
    return model, [batch(g) for _ in range(batches)]
