"""Standard output and errors that a reader may close, on terminals that may lack letters."""

import contextlib
import os
from typing import Any


class Output:
    """A text stream that loses no work: what it cannot write is escaped, or goes with its reader.

    Args:
      stream: the stream; None where the process has none.

    Attributes:
      failure: why it could not be written, as on a full disk; None where it could, or where its
        reader is gone.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        if self._stream is None:
            return len(text)
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is waiting to be written."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Write to nowhere from now on, also what waits: Python flushes it again at its end."""
        if not isinstance(error, BrokenPipeError):
            self.failure = error
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
