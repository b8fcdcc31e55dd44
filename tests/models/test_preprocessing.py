"""Image preprocessing: what is made of images of any shape, and of any file of settings."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxrel.models import Processor, image_processing
from jaxrel.models.preprocessing import ImageProcessing, read_images

CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "fields",
    [
        CLIP,
        CLIP | {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
        {"size": 20, "crop_size": 24},  # zeros around
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 25, "width": 20}},
        {"size": {"height": 8, "width": 20}, "do_center_crop": False, "do_normalize": False},
        {"do_resize": False, "crop_size": 40, "do_rescale": False},
        {},
    ],
)
def test_it_is_what_transformers_does(fields):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs, ours = CLIPImageProcessorPil(**fields), ImageProcessing.from_dict(fields)
    for size in ((31, 50), (50, 31), (24, 24), (12, 90), (1, 1)):
        image = noise(*size)
        expected = theirs([image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        found = ours(image)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert ours.made(size) == found.shape[:2]
    assert ImageProcessing.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize("size", [(2000, 2), (2, 2000)])
def test_a_strip_is_cropped_before_it_is_enlarged(size):
    image = noise(*size)
    short, long = sorted(size)
    whole = (24, 24 * long // short) if size[0] < size[1] else (24 * long // short, 24)
    enlarged = np.asarray(image.resize(whole, Image.Resampling.BILINEAR), np.float64)
    left, top = (whole[0] - 24) // 2, (whole[1] - 24) // 2
    steps = ImageProcessing(24, (24, 24), resample=2, scales=False, normalises=False)
    expected = enlarged[top : top + 24, left : left + 24]
    # Pillow rounds after each of its two passes, and the order of the two depends on the sizes.
    np.testing.assert_allclose(steps(image), expected, atol=2)


def test_memory_does_not_grow_with_the_shape():
    code = (
        "import resource; from PIL import Image\n"
        "from jaxrel.models.preprocessing import image_processing\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for size in ((50_000, 1), (1, 50_000)):\n"
        "    image_processing(224)(Image.new('RGB', size))\n"
        "print(used() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 100e6  # enlarged as a whole it would be 7.5e9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "224"}, "size must be a number of pixels, or hold shortest_edge, .* got '224'"),
        ({"size": []}, r"size must be .* got \[\]"),
        ({"size": {"longest_edge": 9}}, "size must be .* got {'longest_edge': 9}"),
        ({"size": {"shortest_edge": True}}, "size.shortest_edge must be .* got True"),
        ({"crop_size": {"height": 9}}, "crop_size must be"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_mean": "0.5"}, "image_mean must be three numbers, got '0.5'"),
        ({"image_std": [1, 0, 1]}, "image_std must not be 0"),
        ({"resample": "bicubic"}, "resample must be a number of a filter of Pillow"),
        ({"resample": 9}, "resample must be a filter of Pillow, 0 to 5, got 9"),
        ({"rescale_factor": []}, "rescale_factor must be a number"),
        ({"do_resize": "yes"}, "do_resize must be true or false, got 'yes'"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_settings_of_other_types_are_refused(tmp_path, fields, message):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as caught:
        read_images(tmp_path)
    assert str(path) in str(caught.value)


def test_files_of_either_version(tmp_path):
    assert read_images(tmp_path) is None
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": CLIP | {"image_mean": None}}))
    assert read_images(tmp_path) == ImageProcessing(24, (24, 24))
    assert read_images(tmp_path, 16) == ImageProcessing(16, (16, 16))
    path.write_text("{}")
    assert read_images(tmp_path) is None
    path.write_text('{"image_processor": [1]}')
    with pytest.raises(ValueError, match=r"image_processor must be an object, got \[1\]"):
        read_images(tmp_path)


def test_what_the_model_does_not_read_is_told_by_file(tmp_path):
    processor = Processor(None, image_processing(16))
    with pytest.raises(ValueError, match=r"preprocessor_config.json .* 16 x 16 .* 24 x 24, which"):
        processor.image(noise(20, 20), side=24)
    whole = Processor(None, ImageProcessing(16, (16, 16), crops=False))
    with pytest.raises(ValueError, match=r"makes images of 16 x 16 and 32 x 16 pixels, .* to true"):
        whole.image([noise(20, 20), noise(40, 20)], side=16)
    with pytest.raises(ValueError, match="and not of one size, which a model needs"):
        whole.image([noise(20, 20), noise(40, 20)])
    huge = Processor(None, image_processing(10**6))
    with pytest.raises(ValueError, match="1000000 x 1000000 pixels"):
        huge.image(noise(20, 20), side=16)


def test_a_processor_of_transformers_works_too():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = Processor(None, CLIPImageProcessorPil(**CLIP))
    ours = Processor(None, ImageProcessing.from_dict(CLIP))
    image = noise(40, 30)
    np.testing.assert_array_equal(theirs.image(image), ours.image(image))
    assert theirs.seen(image).size == ours.seen(image).size == (30, 30)


def test_without_a_crop_height_and_width_are_what_is_made():
    fields = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 6}}
    images = ImageProcessing.from_dict(fields)
    assert (images.sides, images.mean, images.made((30, 20))) == ((8, 6), (0.5,) * 3, (8, 6))
    by_side = ImageProcessing.from_dict({**fields, "size": {"shortest_edge": 8}})
    assert (by_side.sides, by_side.made((30, 20))) == (None, (8, 12))
    assert by_side.for_size(10).sides == (10, 10)
    # As CLIP's, which crops.
    assert ImageProcessing.from_dict({"size": 8, "crop_size": 6}).sides == (6, 6)
    assert ImageProcessing().for_size((8, 6)).sides == (8, 6)
