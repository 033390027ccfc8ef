"""Fine-tuning of an encoder on a sentence or sentence-pair task, beside simple baselines."""
