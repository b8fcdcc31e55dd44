"""Print pip constraints that hold each dependency at the lower bound in pyproject.toml."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

for requirement in [
    *PROJECT["dependencies"],
    *EXTRAS["train"],
    *EXTRAS["report"],
    *EXTRAS["batch"],
]:
    bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if bound is None:
        raise SystemExit(f"{requirement}: expected a lower bound, such as name>=1.2")
    print("{}=={}".format(*bound.groups()))
