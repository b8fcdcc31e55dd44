"""Images for the small models."""

import numpy as np


def random_images(count=2, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 20, 16, 3), np.uint8))
