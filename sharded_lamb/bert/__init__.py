"""Large-batch BERT pretraining with ShardedLamb: the package's main recipe.

Modules depend on each other in one direction only::

    config -> config_io, keyed, schedule, batch -> corpus, tokenizer -> shards -> prepare -> masking, data
           -> model, metrics -> optim, ds_config -> engine -> trainee -> checkpoint -> train -> study, __main__

Run it with ``torchrun … -m sharded_lamb.bert --config FILE [key=value …]``.
"""
