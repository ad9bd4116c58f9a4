"""What the `zo2` strategy does with Lightning's hooks: several forwards for one `training_step`, and no backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_offload.memory.budget import GIB
from lightning_offload.methods.forwards import StreamedForwards
from lightning_offload.methods.steplog import Entry, LogFile, check_log_file
from lightning_offload.methods.zeroth import ZerothEngine
from lightning_offload.methods.zo2 import ZO2, ZO2Settings
from lightning_offload.resting import WeightsAtRest
from lightning_offload.shortage import reports_shortage
from lightning_offload.windows import writes_while_evaluating
from lightning_offload.zeroth_attaching import (
    attach_zeroth,
    look_for_gradient_hooks,
    look_for_zeroth_readers,
    pack_zeroth,
    resolved,
    run_micro_batch,
    unpack_zeroth,
)

HASHED_SILENTLY_BYTES = 8 * GIB


class ZerothBehaviour(WeightsAtRest[ZerothEngine]):
    """See the module docstring.

    Attributes:
        log_file: Where the log of updates is written as the run goes, if anywhere.
    """

    settings_type: ClassVar[type[ZO2Settings]] = ZO2Settings
    settings: ZO2Settings
    weighs_batches: ClassVar[bool] = True
    """A window's loss is the mean over what its batches learn; `TextModule` then leaves it alone."""
    log_file: Path | None = None
    _log: LogFile | None = None
    _resumed = False

    @override
    def _method(self) -> ZO2:
        return ZO2(self.settings)

    @property
    def log(self) -> list[Entry]:
        """Every update of the weights since the run began, one entry for each."""
        return [] if self.engine is None else self.engine.log

    # Setting up.

    @override
    def _prepare_forwards(self, trainer: Trainer) -> None:
        module, method = self.lightning_module, self._method()
        assert module is not None
        if not any(True for _ in module.parameters()):  # nothing to stream
            return
        dtypes = self.precision_plugin.dtypes(method)
        machine, units = resolved(self.strategy_name, trainer, module, method, dtypes, self.root_device)
        self._forwards = StreamedForwards(module, method, self._make_lanes(machine, method.settings), dtypes, units)
        self._written_outside = writes_while_evaluating(trainer, module)

    @override
    def _attach(self, trainer: Trainer) -> None:
        module, method = self.lightning_module, self._method()
        assert module is not None
        self.engine = attach_zeroth(
            self.strategy_name,
            trainer,
            module,
            method,
            self.precision_plugin.dtypes(method),
            self.root_device,
            self._make_lanes,
            uses=self.uses,
            peers=self._peers,
            agree=self._agree,
        )
        self._window = look_for_zeroth_readers(self.strategy_name, trainer, module)
        self._resumed = False
        self.precision_plugin.records_clip = True
        if self.log_file is not None and self._window.may_write:
            hooks = ", ".join((*self._window.weights, *self._window.epochs, *self._window.boundaries))
            rank_zero_warn(
                f"{self.strategy_name}: {hooks} may write weights, of which `log_file` will know nothing: then it does "
                "not give the weights of this run."
            )

    # Stepping.

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.engine is None:
            return
        if not self._resumed:
            self.engine.drop()  # what an exception that somebody caught has left (the batch size finder does)
        assert self.lightning_module is not None
        look_for_gradient_hooks(self.strategy_name, self.lightning_module)
        trainer: Any = self.lightning_module.trainer
        if self.log_file is not None and not trainer.fast_dev_run:  # which leaves nothing behind
            self._open_log(self.log_file, self.engine)

    def _open_log(self, path: Path, engine: ZerothEngine) -> None:
        if self._peers.rank:  # one writes what all have
            return
        begins = self._log is None and not engine.report.step
        check_log_file(path, resumed=not begins)
        size = sum(p.numel() * p.element_size() for p in engine.module.parameters())
        if begins and size > HASHED_SILENTLY_BYTES:
            rank_zero_info(
                f"{self.strategy_name}: hashes {size / GIB:.1f} GiB of weights, once, for `log_file` to say what it "
                "begins with. `log_file=None` (`trainer.strategy.log_file=null` on the command line) leaves both out."
            )
        self._close_log()  # a tuner's trial had it
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = LogFile(path, engine.header(), engine.log)

    @override
    @reports_shortage
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        with self.precision_plugin.train_step_context():
            if not module.automatic_optimization:  # a mixin: it calls `micro_batch`
                return module.training_step(batch, *args, **kwargs)
            return self._all_forwards(lambda part: module.training_step(part, *args, **kwargs), batch)

    def _all_forwards(self, run: Callable[[Any], Any], batch: Any) -> Any:
        """What the first of them returned, with the loss of all: hooks are handed what is beside it."""
        engine = self.engine
        assert engine is not None
        first: dict[str, Any] = {}

        def keep(part: Any) -> Any:
            output = run(part)
            if engine.lockstep.stream == 0 and isinstance(output, Mapping):
                first.update(output)
            return output

        loss = self.micro_batch(keep, batch)
        return {**first, "loss": loss} if first else loss

    def micro_batch(self, run: Callable[[Any], Any], batch: Any) -> Tensor:
        """Every forward of a micro-batch; see ``run_micro_batch``."""
        engine, module = self.engine, self.lightning_module
        assert engine is not None
        assert module is not None
        if self._adopt_due or self._window.weights:
            self._adopt_due = False
            engine.adopt()
        return run_micro_batch(engine, module, run, batch)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """There is none."""
        return closure_loss

    @override
    @reports_shortage
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        engine, module = self.engine, self.lightning_module
        assert engine is not None
        assert module is not None
        result = closure()
        self.precision_plugin._after_closure(module, optimizer)
        before = len(engine.log)
        engine.step(self.precision_plugin.take_clip())
        if self._log is not None:
            self._log.append(engine.log[before:])
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look for
        if self._window.weights or (self._window.epochs and self._ends_epoch(module.trainer)):
            engine.flush()
            self._adopt_due = True
        return result

    @override
    def _detach(self) -> None:
        super()._detach()
        self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None

    # State.

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.engine is None:
            return super().optimizer_state(optimizer)
        return pack_zeroth(self.engine)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.engine is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        self._resumed = True
        unpack_zeroth(self.engine, checkpoint["optimizer_states"])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_log": None}
