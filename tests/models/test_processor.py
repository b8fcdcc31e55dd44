"""Image preprocessing."""

import numpy as np
from PIL import Image

from jaxrel.models import Processor
from jaxrel.models.vision import IMAGENET_MEAN, IMAGENET_STD, imagenet_processing


def test_imagenet_processing(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8))
    processor = Processor(None, imagenet_processing(24))
    resized = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), np.float32)
    expected = (resized / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    # float32 values of order 1.
    np.testing.assert_allclose(processor.image(image)[0], expected, atol=1e-6)
    assert processor.seen(image).size == image.size
    processor.save(tmp_path)
    again = Processor.from_folder(tmp_path)
    np.testing.assert_array_equal(again.image(image), processor.image(image))
