"""Large-batch image classification with ShardedLamb: any timm model, or a small ViT, on folders or built-in digits.

Imports between modules run one way::

    config, small_vit, schedule, timm -> images, transforms, model -> batches -> evaluate -> train -> digits -> command

Run it with ``torchrun … -m sharded_lamb.recipes.vision train --config FILE [key=value …]``.
"""
