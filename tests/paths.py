"""Where the tests find what they read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SAMPLES = ROOT / "train" / "data" / "samples"
