"""LoRA (arXiv 2106.09685) on a model of transformers, by PEFT: low-rank adapters are trained, the weights stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_offload.errors import OffloadError

_HEADS = ("score", "classifier", "classification_head")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What ``lora={...}`` of a model may say.

    Attributes:
        rank: Of the two factors of each update; None for no LoRA.
        alpha: Updates are multiplied by ``alpha / rank``; default twice the rank.
        targets: ``"all-linear"`` (but the head), or names of layers: ``["q_proj", "v_proj"]``.
        dropout: Of what goes into the adapters.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        rank, alpha, dropout = self.rank, self.alpha, self.dropout
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"lora.rank={rank!r}: give an integer >= 1, or None for no LoRA.")
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0):
            raise ValueError(f"lora.alpha={alpha!r}: give a number above 0, or None for twice the rank.")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"lora.dropout={dropout!r}: give a number from 0 to below 1.")
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise ValueError(f"lora.targets={self.targets!r}: give 'all-linear', or names such as [q_proj, v_proj].")


def put_lora(network: Any, given: Mapping[str, Any] | None) -> None:
    """Freeze `network` and put adapters on it as `given` says; a head of classes is trained whole.

    Raises:
        ValueError: for a setting that is not known, a bad value, or targets that `network` does not have.
        OffloadError: when PEFT is not installed.
    """
    settings = _settings(given)
    if settings.rank is None:
        return
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise OffloadError("lora.rank needs PEFT: pip install 'lightning-offload[peft]'") from error
    heads = [name for name, _ in network.named_children() if name in _HEADS]
    targets = settings.targets
    named = isinstance(targets, str) and targets != "all-linear"
    network.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
            target_modules=[targets] if named else targets,
            lora_dropout=settings.dropout,
            task_type="SEQ_CLS" if heads else "CAUSAL_LM",
            modules_to_save=heads or None,
        )
    )


def _settings(given: Mapping[str, Any] | None) -> LoRA:
    given = given or {}
    known = [field.name for field in fields(LoRA)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"lora has no setting {unknown[0]!r}; there are {', '.join(known)}.")
    settings = LoRA(**given)
    set_alone = [name for name in known if given.get(name) not in (None, getattr(LoRA(), name))]
    if settings.rank is None and set_alone:
        raise ValueError(f"lora.{set_alone[0]}={given[set_alone[0]]!r} without lora.rank: give lora.rank, such as 8.")
    return settings
