"""A JSON file in the user's cache folder, whole at any moment."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/lightning_offload``, else in ``~/.cache``; in the temporary folder of a user without a home."""
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):  # as the XDG specification has it; without a home "~" stays as it is
            return Path(base) / "lightning_offload"
    return Path(tempfile.gettempdir()) / "lightning_offload"


class KeptJson:
    """One JSON object in one file.

    Readers see the old content or the new. Two processes that write at once may lose one of the two entries.

    Attributes:
        path: Where it is.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / name

    def read(self) -> dict[str, Any]:
        """The object; empty where there is no file.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds something else.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content

    def add(self, key: str, value: object) -> None:
        """Writes an entry beside those that can be read.

        Raises:
            OSError: The folder or the file cannot be written.
        """
        try:
            content = self.read()
        except ValueError:
            content = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content | {key: value}, file, indent=2)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise
