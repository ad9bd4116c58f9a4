"""The options of each group, for ``--help``: on as many lines as they need."""

from __future__ import annotations

import textwrap

from hydra.core.global_hydra import GlobalHydra

_WIDTH, _LABEL = 116, 14


def options(*groups: str) -> str:
    """A block of text: a group and its options, then the next; without these, all groups."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    found = groups or tuple(group for group in loader.list_groups("") if group != "hydra")
    lines = [line for group in found for line in _lines(group, loader.get_group_options(group))]
    return "\n".join(lines)


def _lines(group: str, names: list[str]) -> list[str]:
    return textwrap.wrap(
        ", ".join(names), _WIDTH, initial_indent=f"  {group:<{_LABEL}}", subsequent_indent=" " * (_LABEL + 2)
    )
