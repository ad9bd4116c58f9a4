"""The options of each group, for ``--help``: on as many lines as they need."""

from __future__ import annotations

import textwrap

from hydra.core.global_hydra import GlobalHydra

_WIDTH, _LABEL = 116, 14
_FAMILY = 3  # options that share all but their last word, from here on told together


def options(*groups: str) -> str:
    """A block of text: a group and its options, then the next; without these, all groups."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    found = groups or tuple(group for group in loader.list_groups("") if group != "hydra")
    lines = [line for group in found for line in _lines(group, loader.get_group_options(group))]
    return "\n".join(lines)


def folded(names: list[str]) -> list[str]:
    """Families of three and more by what they share, as ``lsp_glue_{cola,mnli,rte}``: two words at least."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition("_")[0], []).append(name)
    told: list[str] = []
    for family, members in families.items():
        if len(members) >= _FAMILY and "_" in family:
            told.append(f"{family}_{{{','.join(name.rpartition('_')[2] for name in members)}}}")
        else:
            told += members
    return sorted(told)


def _lines(group: str, names: list[str]) -> list[str]:
    return textwrap.wrap(
        ", ".join(folded(names)), _WIDTH, initial_indent=f"  {group:<{_LABEL}}", subsequent_indent=" " * (_LABEL + 2)
    )
