"""What keeps working under the strategies: the list behind `tests/test_features.py` and the README's table."""

from tests.features import (
    building,
    callbacks,
    checkpoints,
    compiling,
    hooking,
    interrupting,
    launching,
    optimizing,
    reporting,
    running,
    stepping,
)
from tests.features.registry import REGISTERED

ORDER = (
    running,
    interrupting,
    stepping,
    hooking,
    optimizing,
    checkpoints,
    callbacks,
    reporting,
    building,
    compiling,
    launching,
)
FEATURES = [known for part in ORDER for known in REGISTERED if known.run.__module__ == part.__name__]
"""In the order of the table."""
