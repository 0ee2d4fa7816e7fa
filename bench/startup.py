#!/usr/bin/env python3
"""How much longer QEMU takes from its start to its first KVM_RUN under the interposer than with a KVM that takes no time.

    bench/startup.py [--rounds N] [--cpu-time]      one line, in ms: the difference of the least of the rounds
"""

import argparse
import os
import pathlib
import subprocess
import time

from contestants import QEMU, ROOT

SOURCES = pathlib.Path(__file__).resolve().parent / "startup"
CACHE = ROOT / "cache/bench"
INTERPOSER = ROOT / "build/release/lib/libanykvm-preload.so"
LINE = [QEMU, "-accel", "kvm", "-cpu", "max", "-M", "q35", "-m", "512", "-nodefaults", "-display", "none"]


def build(name):
    library = CACHE / f"{name}.so"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, SOURCES / f"{name}.c"], check=True)
    return library


def start(first_run, kvm, cpu_time):
    """Milliseconds until the first KVM_RUN."""
    environment = {**os.environ, "LD_PRELOAD": f"{first_run} {kvm}", "ANYKVM_ENGINE": "direct", "ANYKVM_QUIET": "1"}
    began = time.monotonic_ns()
    said = subprocess.run(LINE, env=environment, check=True, capture_output=True, text=True, timeout=60).stderr
    at, cpu = map(int, said.split("first KVM_RUN ")[1].split()[:2])
    return (cpu if cpu_time else at - began) / 1e6


def measure(cpu_time=False, rounds=20):
    CACHE.mkdir(parents=True, exist_ok=True)
    first_run, no_time = build("first_run"), build("no_time")
    times = [(start(first_run, INTERPOSER, cpu_time), start(first_run, no_time, cpu_time)) for _ in range(rounds)]
    with_it, without = zip(*times)
    return min(with_it) - min(without)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    print(f"{measure(options.cpu_time, options.rounds):.1f}")
