"""The few exceptions of the package. Each says what was asked, what there was, and what to change.

Bad values of settings are ``ValueError``, wrong types ``TypeError``, conflicts of Trainer flags Lightning's
``MisconfigurationException``; the classes below are for what none of those says.
"""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Something this package cannot do with what it was given; the message says what to change."""


class HostMemoryError(OffloadError):
    """The host has less memory than the arenas need; raised before anything is allocated."""


class PartitionError(OffloadError, ValueError):
    """A model, or a ``blocks=`` setting, that cannot be split into units."""


class NonFiniteError(OffloadError):
    """Too many steps in a row had a non-finite gradient."""


class PeersLostError(OffloadError):
    """Another process of a training on several devices is gone, or far behind."""


class RaceError(OffloadError):
    """Two unordered accesses to one buffer, found by ``CheckedLanes``."""


class CheckpointError(OffloadError):
    """A checkpoint that is damaged, or that belongs to another model."""


class DataError(OffloadError, ValueError):
    """A data file that cannot be read; names the file, the line and the reason."""
