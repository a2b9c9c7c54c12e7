"""A small model of every architecture whose layers have a preset, from configs, offline.

Two layers of width 32 and 300 tokens each. Weights are drawn wide (0.1), so that attention tells
its inputs apart, and what an architecture adds bites at this size: grouped queries, a window that
is shorter than a batch, soft caps that the logits reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 300
PAD, BOS, EOS = 0, 1, 2
IDS: dict[str, Any] = {
    "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS
}  # fmt: skip
SHAPE: dict[str, Any] = IDS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
GROUPED: dict[str, Any] = SHAPE | {"num_key_value_heads": 2}
BART: dict[str, Any] = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}

CAUSAL: dict[str, tuple[type[nn.Module], Callable[[], Any]]] = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED)),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**GROUPED, sliding_window=4)),
    "mixtral": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": (hf.GemmaForCausalLM, lambda: hf.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4,
            attn_logit_softcapping=0.5, final_logit_softcapping=1.0,
        ),
    ),
    "phi": (hf.PhiForCausalLM, lambda: hf.PhiConfig(**SHAPE)),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**GROUPED)),
    "gpt2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(
            **IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1
        ),
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**SHAPE, rotary_pct=0.5)),
}  # fmt: skip
SEQUENCES: dict[str, tuple[type[nn.Module], Callable[[], Any]]] = {
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        ),
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(
            **IDS, **BART, d_model=32, max_position_embeddings=64, init_std=0.1,
            decoder_start_token_id=EOS, forced_eos_token_id=EOS,
        ),
    ),
}  # fmt: skip
ENCODERS: dict[str, tuple[type[nn.Module], Callable[[], Any]]] = {
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCAB, pad_token_id=PAD, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
            max_position_embeddings=64, initializer_range=0.1,
        ),
    ),
    "bert": (hf.BertForSequenceClassification, lambda: hf.BertConfig(**SHAPE)),
    "roberta": (hf.RobertaForSequenceClassification, lambda: hf.RobertaConfig(**SHAPE)),
    "deberta": (
        hf.DebertaForSequenceClassification,
        lambda: hf.DebertaConfig(**SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    ),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        lambda: hf.DebertaV2Config(
            **SHAPE, relative_attention=True, position_buckets=8, share_att_key=True,
            pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
        ),
    ),
}  # fmt: skip
ARCHITECTURES = {**CAUSAL, **SEQUENCES, **ENCODERS}
"""By model_type; encoders are for two classes."""


def tokenizer(rows: int = 99) -> Any:
    """A tokenizer of so many tokens, for a small embedding: numbers, split at spaces."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(str, range(rows - 4))]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """The model in eval mode; the same bits for a seed."""
    torch.manual_seed(seed)
    make, config = ARCHITECTURES[name]
    return make(config()).eval()


def batch(name: str, rows: int = 3, length: int = 11, seed: int = 4) -> dict[str, Tensor]:
    """What the model takes, labels included: ids (rows, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    if name in ENCODERS:
        return {"input_ids": ids, "labels": torch.arange(rows) % 2}
    return {"input_ids": ids, "labels": ids.clone()}
