"""transformers.Trainer trains an injected model: python examples/trainer.py [OUTPUT]

It takes a minute and needs no network: it uses the demo's base model and data. It writes adapter/,
in PEFT's format, and Trainer's checkpoints to OUTPUT (default: runs/trainer).
"""

from __future__ import annotations

import sys

import torch
import transformers

import lora
from lora.finetune.data.corpus import read_examples
from lora.finetune.models import load_base

output = sys.argv[1] if len(sys.argv) > 1 else "runs/trainer"
corpus = read_examples("demo", limits={"train": 96, "dev": 96, "test": 96})
base = load_base("demo", labels=len(corpus.labels), task=corpus.task, seed=0)
print(lora.inject(base.model, lora.LoRAConfig(r=8, modules_to_save=base.new)))


def rows(split):
    """Returns the examples of a split as the dicts that Trainer expects."""
    encoded = base.tokenizer([example.text for example in split], truncation=True, max_length=64)
    targets = map(int, corpus.targets(split))
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": target}
        for ids, mask, target in zip(encoded["input_ids"], encoded["attention_mask"], targets)
    ]


trainer = transformers.Trainer(
    model=base.model,
    args=transformers.TrainingArguments(
        output_dir=output, num_train_epochs=2, per_device_train_batch_size=16, learning_rate=2e-3,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        save_total_limit=1, logging_steps=5, report_to="none",
    ),
    train_dataset=rows(corpus.train),
    eval_dataset=rows(corpus.dev),
    data_collator=transformers.DataCollatorWithPadding(base.tokenizer),
    callbacks=[lora.AdapterCallback()],
)  # fmt: skip
trainer.train()

fresh = load_base("demo", labels=len(corpus.labels), task=corpus.task, seed=0)
lora.load(fresh.model, f"{output}/adapter")
text = base.tokenizer("A warm and funny film.", return_tensors="pt")
with torch.no_grad():
    logits = fresh.model.eval()(**text).logits
    assert torch.equal(logits, base.model.eval().cpu()(**text).logits)
print("A warm and funny film.", dict(zip(corpus.labels, logits.softmax(-1)[0].tolist())))
