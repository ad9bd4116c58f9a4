"""Every feature under every strategy: it works, or is refused with a message that names the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.features import FEATURES
from tests.features.arm import Arm
from tests.features.registry import NAMES, Feature


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", FEATURES, ids=lambda known: known.run.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_works_or_is_refused(known: Feature, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known.check(Arm(name, tmp_path))


def test_titles_and_names_are_unique_and_every_refusal_is_of_a_strategy() -> None:
    assert len({known.title for known in FEATURES}) == len({known.run.__name__ for known in FEATURES}) == len(FEATURES)
    assert all(known.refused.keys() <= set(NAMES) for known in FEATURES)
