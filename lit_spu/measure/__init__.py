"""Measure memory and time, in bytes and seconds, for callbacks, studies and benchmarks."""

from lit_spu.measure.accelerator import AcceleratorPeak
from lit_spu.measure.clocks import Clock, Durations, interleave
from lit_spu.measure.cores import cores
from lit_spu.measure.launches import Launches
from lit_spu.measure.live import Kind, LiveBytes
from lit_spu.measure.resident import ResidentPeak
from lit_spu.measure.saved import SavedForBackward

MIB = 2**20
"""Bytes in a MiB, the unit of every name that ends in `_mib`."""

__all__ = [
    "MIB",
    "AcceleratorPeak",
    "Clock",
    "Durations",
    "Kind",
    "Launches",
    "LiveBytes",
    "ResidentPeak",
    "SavedForBackward",
    "cores",
    "interleave",
]
