"""What tests expect of errors."""

import pytest


def error(match, kind=ValueError):
    """Expect this error, with a text that matches."""
    return pytest.raises(kind, match=match)
