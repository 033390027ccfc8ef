"""Large-batch BERT pretraining with ShardedLamb: the package's main recipe.

What is not about BERT is in `recipes/training`. Imports between modules run one way::

    config -> schedule -> corpus, tokenizer -> shards -> prepare -> masking, data -> model, metrics
           -> optim, ds_config -> engine -> train_backend -> train -> study, beside_trainer, __main__ -> pretrain
           -> quickstart

Run it with ``torchrun … -m sharded_lamb.bert --config FILE [key=value …]``.
"""
