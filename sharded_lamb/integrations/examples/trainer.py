"""Hugging Face's Trainer: ``torchrun --standalone --nproc-per-node 2 trainer.py FOLDER``; again, it resumes."""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.transformers import ShardedLambCallback

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer")
saved = any(folder.glob("checkpoint-*"))
arguments = TrainingArguments(
    str(folder),
    max_steps=8,
    save_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    warmup_steps=2,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    report_to=[],
)
shape = BertConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500
)
tokens = torch.randint(0, 500, (64, 16), generator=torch.Generator().manual_seed(0), device="cpu")
rows = [{"input_ids": row, "labels": row} for row in tokens]
model = BertForMaskedLM(shape)
no_decay = ["bias$", "LayerNorm"]
optimizer = ShardedLamb(model.named_parameters(), lr=2e-3, exclude_from_weight_decay=no_decay)
trainer = Trainer(
    model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[ShardedLambCallback()]
)
trainer.train(resume_from_checkpoint=saved or None)
