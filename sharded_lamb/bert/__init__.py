"""Large-batch BERT pretraining with ShardedLamb: the package's main recipe.

Imports between modules run one way::

    config, shipped -> config_io, stateless_rng, schedule, batch -> corpus, tokenizer -> shards -> prepare
           -> masking, data -> model, metrics -> optim, ds_config -> engine -> train_backend -> checkpoint -> train
           -> study, beside_trainer, __main__ -> pretrain -> quickstart

Run it with ``torchrun … -m sharded_lamb.bert --config FILE [key=value …]``.
"""
