"""What streams beyond the first must not leave behind in a LightningModule: log entries, and updates of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_LOGGING = ("log", "log_dict", "print")


class Muting:
    """``start(n)``, ``switch(k)`` whenever stream k goes on, ``stop()``.

    Each stream finds the metrics of the module as they were at the start, and after ``stop`` they hold what stream 0
    left. Logging by another stream does nothing. Found by what they can do, so that Lightning need not be imported.

    Args:
        module: The module whose step runs; metrics and logging modules may sit at any depth.
        running: Tells which stream runs now.
    """

    def __init__(self, module: nn.Module, running: Callable[[], int]) -> None:
        self._module, self._running = module, running
        self._metrics: list[nn.Module] = []
        self._states: list[list[dict[str, Any]]] = []  # per stream, the `__dict__` of each metric
        self._stream = 0
        self._logs: list[tuple[nn.Module, str, Any]] = []

    def start(self, streams: int) -> None:
        """From here on streams are kept apart."""
        self.stop()
        modules = list(self._module.modules())
        self._metrics = [module for module in modules if is_metric(module)]
        self._states = [[vars(metric) for metric in self._metrics]]
        self._states += [[_own(metric) for metric in self._metrics] for _ in range(1, streams)]
        self._stream = 0
        for module in modules:
            if hasattr(module, "log_dict"):
                self._mute(module)

    def switch(self, stream: int) -> None:
        """Stream ``stream`` goes on."""
        if stream != self._stream:
            self._stream = stream
            for metric, state in zip(self._metrics, self._states[stream], strict=True):
                object.__setattr__(metric, "__dict__", state)

    def stop(self) -> None:
        """Metrics and logging are those of stream 0 again. Idempotent."""
        if self._states:
            self.switch(0)
        self._metrics, self._states = [], []
        while self._logs:
            module, name, before = self._logs.pop()
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)

    def _mute(self, module: nn.Module) -> None:
        for name in _LOGGING:
            method = getattr(module, name, None)
            if callable(method):
                self._logs.append((module, name, vars(module).get(name)))
                setattr(module, name, _for_first(method, self._running))


def is_metric(module: nn.Module) -> bool:
    """Whether this is a metric, a collection or a wrapper of torchmetrics."""
    return any(base.__module__.partition(".")[0] == "torchmetrics" for base in type(module).__mro__)


def _for_first(method: Callable[..., Any], running: Callable[[], int]) -> Callable[..., Any]:
    def muted(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) if running() == 0 else None

    return muted


def _own(metric: nn.Module) -> dict[str, Any]:
    """The attributes of a metric, such that changing them in place changes no other stream's.

    Elements of list states are shared: metrics append to them and replace them, but do not write into them.
    """
    states = getattr(metric, "_defaults", {})
    return {
        name: value.clone() if name in states and isinstance(value, Tensor) else _containers(value)
        for name, value in vars(metric).items()
    }


def _containers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _containers(item) for key, item in value.items()}
    if type(value) is list:
        return [_containers(item) for item in value]
    return value.copy() if isinstance(value, (dict, list, set)) else value
