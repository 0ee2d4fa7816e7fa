"""What bench/measure.cpp measures inside one process, for each engine: exits, translation, the life of virtual machines."""

import os
import subprocess

from contestants import ROOT

PROGRAM = ROOT / "build/release/bin/anykvm_bench"
# Measurement, title, unit, what is to be reached by the engine that is to be fast.
ROWS = [("port_exit_ns", "KVM_RUN to a port-I/O exit and back", "ns", "< 200"),
        ("mmio_exit_ns", "KVM_RUN to an MMIO read's exit and back", "ns", "< 400"),
        ("guest_mips_integer", "loop of register arithmetic", "million instructions/s", ""),
        ("guest_mips_memory", "loop of loads, stores, calls", "million instructions/s", ""),
        ("translated_mips", "code that runs once, page after page", "million instructions/s", ">= 1"),
        ("kick_integer_us_p99", "signal to KVM_RUN's EINTR out of the first loop, 99th percentile", "µs", "< 50"),
        ("kick_memory_us_p99", "the same out of the second", "µs", "< 50"),
        ("wake_us_p99", "interrupt line to a halted vCPU's handler, 99th percentile", "µs", "< 1000"),
        ("thousand_vms_s", "1,000 VMs created, run, destroyed", "s", "< 2"),
        ("left_fds", "descriptors that they left", "", "0"),
        ("left_threads", "threads that they left", "", "0"),
        ("left_kib", "memory that they left", "KiB", "")]
WHATS = ("exits", "mips", "translation", "kick", "lives")


def measure(engine):
    """Value by name."""
    values = {}
    for what in WHATS:
        output = subprocess.run([PROGRAM, what], check=True, capture_output=True, text=True, timeout=120,
                                env={**os.environ, "ANYKVM_ENGINE": engine}).stdout
        values.update((name, float(value)) for name, value in (line.split() for line in output.splitlines()))
    return values
