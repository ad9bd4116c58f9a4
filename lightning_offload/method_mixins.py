"""Modules that bring their method along: under its strategy, or under a plain one with an engine of their own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_offload.attachment import Attachment, GradientAttachment
from lightning_offload.behaviour import OffloadBehaviour
from lightning_offload.meft_behaviour import (
    check_settings,
    complete,
    has_adapters,
    keep_settings,
    put_adapters_on,
    warn_of_new_adapters,
)
from lightning_offload.methods.lsp import LSP, LSPSettings
from lightning_offload.methods.meft import MEFT, MEFTSettings
from lightning_offload.methods.settings import CommonSettings
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.mixins import OffloadMixin
from lightning_offload.precision import AnyMethod
from lightning_offload.zeroth_attachment import ZerothAttachment


class MethodMixin(OffloadMixin):
    """What `LSPMixin`, `MEFTMixin` and `ZO2Mixin` share."""

    offload_method: ClassVar[str]
    _settings_type: ClassVar[type[CommonSettings]]
    _attachment_type: ClassVar[type[Attachment[Any]]]

    @property
    def method_settings(self) -> dict[str, Any]:
        """What ``offload`` says of the method."""
        names = {field.name for field in fields(self._settings_type)}
        return {name: value for name, value in self.offload.items() if name in names}

    def offload_own_method(self) -> AnyMethod:
        """The method, for a strategy that brings none."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[Callback]:
        """What steps under a plain strategy."""
        trainer = self._module.trainer
        if isinstance(trainer.strategy, OffloadBehaviour) or Attachment.of(trainer) is not None:
            return []
        return [self._attachment_type()]

    @property
    def _attachment(self) -> Attachment[Any] | None:
        trainer = self._module.trainer
        if isinstance(trainer.strategy, OffloadBehaviour):
            return None
        attachment = Attachment.of(trainer)
        if attachment is None:
            raise MisconfigurationException(
                f"`{type(self).__name__}.configure_callbacks` left out what its mixin steps with: return "
                "`[*super().configure_callbacks(), ...]`"
            )
        return attachment


class LSPMixin(MethodMixin):
    """``OffloadMixin`` for modules that are trained by method ``lsp``, whatever the strategy.

    ::

        class LitModel(LSPMixin, L.LightningModule):
            offload = dict(dim=0.25, accumulate_grad_batches=4)

    Under ``lsp_offload`` the strategy does the work. Under a plain strategy of one device the module brings its own
    engine and gives the same numbers without hiding anything: the update rule by itself. Checkpoints of one continue
    in the other. Those who override ``configure_callbacks`` must add what ``super()`` returns.

    Attributes:
        offload: Settings of the step and of ``LSPSettings`` by name, and ``calibration_dataloader``.
    """

    offload_method = LSP.name
    _settings_type = LSPSettings
    _attachment_type = GradientAttachment
    _of_method = frozenset({field.name for field in fields(LSPSettings)} | {"calibration_dataloader"})

    @property
    def offload_calibration(self) -> Any:
        """Batches for ``calibration="batch"``, or None."""
        return self.offload.get("calibration_dataloader")

    def offload_own_method(self) -> LSP:
        """See ``MethodMixin``."""
        return LSP(LSPSettings(**self.method_settings))


class MEFTMixin(MethodMixin):
    """``OffloadMixin`` for modules that are trained by method ``meft``: adapters beside a frozen backbone.

    ::

        class LitModel(MEFTMixin, L.LightningModule):
            offload = dict(width=2048, accumulate_grad_batches=4)

    Adapters are attached before ``configure_optimizers``, by the strategy or, under a plain strategy of one device,
    by the module, which then brings its own engine with the same numbers. Checkpoints of one continue in the other, and
    ``load_from_checkpoint`` finds adapters to load into. Those who override ``configure_callbacks``,
    ``on_save_checkpoint`` or ``on_load_checkpoint`` must call ``super()``, and add the callbacks that it returns.

    Attributes:
        offload: Settings of the step and of ``MEFTSettings`` by name.
    """

    offload_method = MEFT.name
    _settings_type = MEFTSettings
    _attachment_type = GradientAttachment
    _of_method = frozenset(field.name for field in fields(MEFTSettings))

    def offload_own_method(self) -> MEFT:
        """See ``MethodMixin``."""
        return MEFT(MEFTSettings(**self.method_settings))

    def configure_callbacks(self) -> list[Callback]:
        """See ``MethodMixin``: adapters are there before anything is loaded into them."""
        made = super().configure_callbacks()
        if made:
            self._put_adapters_on()
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Has the checkpoint say what adapters are in it."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        keep_settings(checkpoint, self._module)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where no strategy does it, makes a place for adapters that come, and keeps those that do not."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        module = self._module
        if module._trainer is not None and isinstance(module._trainer.strategy, OffloadBehaviour):
            return
        if has_adapters(checkpoint):
            self._put_adapters_on()
            check_settings(checkpoint, module)
        elif module._trainer is not None and module._trainer.state.fn == TrainerFn.FITTING:
            warn_of_new_adapters(type(self).__name__)
            checkpoint["state_dict"] = complete(checkpoint["state_dict"], module)
            checkpoint["optimizer_states"] = []

    def _put_adapters_on(self) -> None:
        put_adapters_on(type(self).__name__, self._module, MEFTSettings(**self.method_settings))


class ZO2Mixin(MethodMixin):
    """``OffloadMixin`` for modules that are trained by method ``zo2``, whatever the strategy: forwards alone.

    ::

        class LitModel(ZO2Mixin, L.LightningModule):
            offload = dict(eps=1e-3, accumulate_grad_batches=4)

            def loss(self, batch, batch_idx): ...
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1e-6)

    ``loss`` runs ``2 * directions`` times for each part of a batch. Under ``zo2_offload`` the strategy does the work;
    under a plain strategy of one device the module brings its own engine, with the same bits. Checkpoints of one
    continue in the other. Those who override ``configure_callbacks`` must add what ``super()`` returns.

    Attributes:
        offload: Settings of the step and of ``ZO2Settings`` by name.
    """

    offload_method = ZO2.name
    _settings_type = ZO2Settings
    _attachment_type = ZerothAttachment
    _of_method = frozenset(field.name for field in fields(ZO2Settings))

    def offload_own_method(self) -> ZO2:
        """See ``MethodMixin``."""
        return ZO2(ZO2Settings(**self.method_settings))
