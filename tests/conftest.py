"""Small models built from configurations, on one thread, offline."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a hub library
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, as of this one

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from lora.finetune import cache
from lora.finetune.demo.fetch import is_here
from lora.finetune.models import load_skeleton

torch.set_num_threads(1)
# A test that does not ask for auto_dtype computes alike on every machine.
os.environ.setdefault("LORA_BFLOAT16", "0")
# No test leaves anything in the user's cache. Only tests of the real reviews read it.
USERS_CACHE = cache.folder()
os.environ["LORA_CACHE"] = tempfile.mkdtemp(prefix="lora-cache-")
atexit.register(shutil.rmtree, os.environ["LORA_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


# In bfloat16 with the slow tests: a processor without its products takes several times as long.
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=DTYPES)
def auto_dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """What `--dtype auto` means, here and in the processes that a test starts. A test that asks for
    it runs once with each answer, whatever the machine supports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_BFLOAT16", str(int(request.param == "bfloat16")))
        yield request.param


ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of the machine that the library computes on."""
    return torch.device(request.param)


@pytest.fixture
def root() -> Path:
    return ROOT


def needs_shared(folder: str) -> Path:
    """A folder of the outside data, or a skip that says why."""
    path = SHARED / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not here: outside data, never part of the tree")
    return path


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's downloads, or a skip that says how to get them."""
    monkeypatch.setenv("LORA_CACHE", str(USERS_CACHE))
    if not is_here("films"):
        pytest.skip(f"NO FILM REVIEWS in {USERS_CACHE}: run lora data fetch reviews")


def save_distilbert(folder: Path, lm_head: bool = False, **kwargs: object) -> Path:
    """Save a DistilBERT, 2 layers of 32, with the demo's tokenizer, or rather its first 4,096
    words: with all of them most of a short run's time goes into the vocabulary."""
    core = json.loads(
        load_skeleton("demo", 2, "classification").tokenizer.backend_tokenizer.to_str()
    )
    vocabulary = core["model"]["vocab"]
    core["model"]["vocab"] = {word: row for word, row in vocabulary.items() if row < 4096}
    words = transformers.BertTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    words.save_pretrained(folder)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 4096}
    torch.manual_seed(0)
    kind = transformers.DistilBertForMaskedLM if lm_head else transformers.DistilBertModel
    kind(transformers.DistilBertConfig(**shape | kwargs)).save_pretrained(folder)
    return folder


def distilbert(seed: int = 0, **kwargs: object) -> nn.Module:
    """DistilBERT for two classes, 2 layers of 32."""
    torch.manual_seed(seed)
    config = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=99, num_labels=2, **kwargs
    )
    return transformers.DistilBertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    """GPT-2, 2 layers of 32: its layers are Conv1D."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(seed: int = 0, num_layers: int = 2, **kwargs: object) -> nn.Module:
    """LLaMA, 2 layers of 32: no biases, and a head of its own."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, max_position_embeddings=64, pad_token_id=None,
        bos_token_id=1, eos_token_id=2, **kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(rows: int = 3, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(1, 99, (rows, length), generator=generator)


def bert_lm(seed: int = 0) -> nn.Module:
    """BERT for masked tokens, 2 layers of 32: its head ties a weight and a bias."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=99, initializer_range=0.2,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def roberta(seed: int = 0) -> nn.Module:
    """RoBERTa for two classes, 2 layers of 32: its head has layers within."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=99, num_labels=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()
