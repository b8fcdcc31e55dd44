"""Many inputs: one callable from rows to rows, and what runs it over files of any length.

`Explainer` is the unit of work; `embedded.run` runs it on one machine, from a file or folder to a
folder of Parquet files; `ray_data.run` runs the same job on Ray Data.
"""

from jaxrel.batch.explainer import Explainer
from jaxrel.batch.functions import of_function
from jaxrel.explanations.tables import COLUMNS, schema

__all__ = ["COLUMNS", "Explainer", "of_function", "schema"]
