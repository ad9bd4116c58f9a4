"""Strategies under which weights stay in host memory when nothing runs, and the device has copies of some."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_offload.behaviour import AnyEngine, OffloadBehaviour
from lightning_offload.shortage import reports_shortage


class Forwards(Protocol):
    """What brings weights up for an evaluation outside of fit."""

    def adopt(self) -> None:
        """Somebody else has written weights: they are the truth."""
        ...

    def detach(self) -> None:
        """Take everything off; weights stay where they are at rest."""
        ...


class WeightsAtRest(OffloadBehaviour[AnyEngine]):
    """See the module docstring."""

    _forwards: Forwards | None = None
    _written_outside = False

    @override
    def setup(self, trainer: Trainer) -> None:
        self._close_forwards()
        self._refuse_graphs(trainer)
        super().setup(trainer)

    def _refuse_graphs(self, trainer: Trainer) -> None:
        """Tracing by `torch.jit` cannot follow weights that come and go."""
        if getattr(self.lightning_module, "example_input_array", None) is None:
            return
        for logger in trainer.loggers:
            if getattr(logger, "_log_graph", False):
                raise MisconfigurationException(
                    f"`{type(logger).__name__}(log_graph=True)` traces the module, which cannot be done under "
                    f"`{type(self).__name__}`: its weights come and go while it runs. Remove `log_graph=True`, and "
                    "call `logger.experiment.add_graph(module, module.example_input_array)` before `fit`."
                )

    @override
    def _convert(self) -> None:
        """Weights are kept as they were put."""
        if self.engine is not None or self._forwards is not None:
            self._convert_buffers()
        else:
            super()._convert()

    @override
    def model_to_device(self) -> None:
        """Weights stay where they were put."""
        if self.engine is not None or self._forwards is not None:
            self._buffers_to_device()
        else:
            super().model_to_device()

    # Evaluating: hooks before a batch may have written weights of which the device has copies.

    @override
    @reports_shortage
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._look_again()
        return super().validation_step(*args, **kwargs)

    @override
    @reports_shortage
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._look_again()
        return super().test_step(*args, **kwargs)

    @override
    @reports_shortage
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._look_again()
        return super().predict_step(*args, **kwargs)

    def _look_again(self) -> None:
        if self._forwards is not None:
            if self._written_outside:
                self._forwards.adopt()
        elif self.engine is not None and self._window.may_write and not self.engine.closed:
            self.engine.adopt()

    @override
    def teardown(self) -> None:
        self._close_forwards()
        super().teardown()

    def _close_forwards(self) -> None:
        if self._forwards is not None:
            self._forwards.detach()
        self._forwards = None

    @property
    @override
    def _hangs_on_module(self) -> bool:
        return self._forwards is not None or super()._hangs_on_module

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_forwards": None}
