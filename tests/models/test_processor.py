"""Image preprocessing."""

import numpy as np
from PIL import Image

from jaxrel.images import read_image
from jaxrel.models import Processor, image_processing
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


def test_a_photograph_is_upright_however_it_is_opened(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    processor = Processor(None, image_processing(16))
    with Image.open(tmp_path / "a.png") as image:
        for one in (processor.seen(image), image):
            found = processor.image(one)
            assert found.shape == (1, 16, 16, 3)
        read = read_image(tmp_path / "a.png")
        np.testing.assert_array_equal(processor.image(image), processor.image(read))
        np.testing.assert_array_equal(processor.seen(image), processor.seen(read))
