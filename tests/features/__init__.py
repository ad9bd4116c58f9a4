"""What keeps working under the strategies: the list behind `tests/test_features.py` and the README's table."""

from tests.features import building, callbacks, checkpoints, interrupting, reporting, running, stepping
from tests.features.registry import FEATURES, NAMES, feature_rows, refusal_rows

__all__ = ["FEATURES", "NAMES", "feature_rows", "refusal_rows"]
