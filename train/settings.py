"""The old home of the recipes' settings, for one version; they stand beside their recipes now."""

from jaxrel.renamed import renamed

_HOMES = {
    "clip_shapes": ("ClipShapes",),
    "mapper": ("MapperShapes", "MapperReal"),
    "vqa_shapes": ("VqaShapes",),
    "caption_shapes": ("CaptionShapes",),
    "vqa_v2": ("VqaV2",),
    "caption_coco": ("CaptionCoco",),
    "captioner_shapes": ("CaptionerShapes", "GridTDShapes", "AoAShapes"),
    "captioner_real": (
        "CaptionerReal",
        "GridTDCoco",
        "AoACoco",
        "GridTDFlickr30k",
        "AoAFlickr30k",
    ),
    "finetune": ("FinetuneShapes", "FinetuneReal", "FinetuneCoco", "FinetuneFlickr30k"),
}

__getattr__ = renamed(
    __name__,
    {
        name: f"jaxrel.train.recipes.{module}.{name}"
        for module, names in _HOMES.items()
        for name in names
    },
)
