"""The old home of the recipes' settings, for one version; they stand beside their recipes now."""

from jaxrel.renamed import renamed

__getattr__ = renamed(__name__, {"FinetuneShapes": "jaxrel.train.recipes.finetune.FinetuneShapes"})
