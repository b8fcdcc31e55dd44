"""The old name of `jaxrel.images`, for one version."""

from jaxrel.renamed import renamed

__getattr__ = renamed(
    __name__,
    {
        "*": "jaxrel.images",
        "read_picture": "jaxrel.images.read_image",
        "read_pictures": "jaxrel.images.read_images",
    },
)
