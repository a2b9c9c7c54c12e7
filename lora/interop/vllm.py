"""Checks whether vLLM can serve an adapter's folder as it is, and prints the command that does."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lora.errors import CheckpointError, command
from lora.files import writable, write_whole
from lora.interop.answers import AnswerFormat
from lora.interop.pretrained import base_config
from lora.interop.saved_lora import MERGE_ADVICE, SavedLoRA, read_saved_lora

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank."""


def reasons_against_vllm(saved: SavedLoRA) -> list[str]:
    """Returns the reasons why vLLM cannot serve an adapter, one sentence each; [] if it can.

    It cannot tell whether vLLM runs adapters on the base's architecture: the folder does not say.
    """
    config, reasons = saved.config, []
    if saved.other_keys:
        reasons.append(
            f"{saved.other_keys[0]}: vLLM reads only low-rank updates, no biases, no"
            " modules_to_save, no trained tokens."
        )
    # vLLM scales every layer by lora_alpha and r (or √r), and reads no pattern.
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    odd = [n for n in saved.layers if not math.isclose(saved.alphas[n] / saved.rank(n), scaling)]
    if odd:
        reasons.append(
            f"{odd[0]} and {len(odd) - 1} others have another rank or alpha: vLLM would scale"
            " them like the rest, without an error."
        )
    if _largest(saved) > VLLM_RANKS[-1]:
        reasons.append(f"rank {_largest(saved)}: vLLM takes at most {VLLM_RANKS[-1]}.")
    embeddings = [name for name in saved.embeddings if name.rpartition(".")[2] != "embed_tokens"]
    if embeddings:
        reasons.append(f"{embeddings[0]}: the only embedding that vLLM adapts is embed_tokens.")
    return reasons


def _largest(saved: SavedLoRA) -> int:
    return max(saved.rank(name) for name in saved.layers)


def vllm_command(adapter: Path, base: str, answer: AnswerFormat | None = None) -> str:
    """Returns the command that serves an adapter with vLLM, on the base in a folder or on the hub.

    If the run's end tokens or template differ from the base's, they are written into the adapter's
    folder, and the command names the files.
    Raises CheckpointError if vLLM cannot serve it, and what read_saved_lora() raises.
    """
    saved = read_saved_lora(adapter, base_config(base))
    reasons = reasons_against_vllm(saved)
    if reasons:
        listed = "\n  ".join(reasons)
        raise CheckpointError(f"vLLM cannot serve {adapter}.\n  {listed}\n{MERGE_ADVICE}")
    rank = next(rank for rank in VLLM_RANKS if rank >= _largest(saved))
    module = f"{adapter.resolve().name}={saved.folder}"
    flags: list[object] = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", module]
    if answer and answer.new_end_token is not None:
        generation = json.dumps(answer.generation, indent=2)
        write_beside(saved.folder / "generation_config.json", generation)
        flags += ["--generation-config", saved.folder]
    if answer and answer.template:
        template = write_beside(saved.folder / "chat_template.jinja", answer.template)
        flags += ["--chat-template", template]
    return command("vllm", "serve", base, *flags)


def write_beside(path: Path, text: str) -> Path:
    """Writes a text file that belongs to an export. Returns its path."""
    with writable(path, CheckpointError, "Free space, or pass another --output."):
        write_whole(path, text.encode())
    return path
