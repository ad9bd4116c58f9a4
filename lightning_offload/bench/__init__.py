"""What this machine can do and what the methods make of it: ``lightning-offload bench``.

Each section compares arms that run in turns, round by round in one process: absolute times of a shared machine mean
little, ratios within a round do.
"""

from lightning_offload.bench.quality import QualitySettings
from lightning_offload.bench.recall import RecallSettings
from lightning_offload.bench.report import Report, Row, Table
from lightning_offload.bench.sections import SECTIONS, BenchSettings, run_bench
from lightning_offload.bench.zeroth import ZerothSettings

__all__ = [
    "SECTIONS",
    "BenchSettings",
    "QualitySettings",
    "RecallSettings",
    "Report",
    "Row",
    "Table",
    "ZerothSettings",
    "run_bench",
]
