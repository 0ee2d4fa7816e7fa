#!/usr/bin/env python3
"""What the benchmark must notice: workloads that fail, hang, end the guest, print something else or run by a wrong clock; and
how rounds become figures. Shell scripts stand for guests here."""

import argparse
import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import contestants  # noqa: E402
from contestants import Result  # noqa: E402

loader = importlib.machinery.SourceFileLoader("bench_run", str(BENCH / "run"))
run = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_run", loader))
loader.exec_module(run)

GOOD = "echo '@begin good'; echo '@end good 2000 1000 0 abc'; "


def collect(script, names, patience=20):
    return contestants.collect(["sh", "-c", script], names, patience, True)[0]


def check(what, good):
    if not good:
        sys.exit(f"FAILED: {what}")


def reading():
    results = collect(GOOD + "echo 'cc1: no such file'; echo '@begin bad'; echo '@end bad 5 5 256 0'", ["good", "bad"])
    check("a good workload", results["good"].problem is None and results["good"].output == "abc" and results["good"].seconds == 2e-6)
    check("a bad status", results["bad"].seconds is None and "256" in results["bad"].problem)
    check("a guest that ends early", set(collect(GOOD + "echo '@begin next'; exit 1", ["good", "next"])) == {"good"})
    check("a guest that hangs", set(collect(GOOD + "exec sleep 60", ["good", "next"], patience=1)) == {"good"})
    slow = collect("echo '@begin x'; sleep 1; echo '@end x 100000000 5 0 abc'", ["x"])["x"]
    check("a clock that is slow", "clock" in (slow.problem or ""))
    fast = collect("echo '@begin x'; echo '@end x 9000000000 5 0 abc'", ["x"])["x"]
    check("a clock that is fast", "clock" in (fast.problem or ""))
    used = collect("echo '@begin x'; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo '@end x 100000000 5 0 abc'", ["x"])["x"]
    check("CPU time", 0.005 < used.cpu_seconds < 5)


def restarting():
    """A workload that ends the guest costs only its own result."""
    def initrd(*parts):
        file = tempfile.NamedTemporaryFile()
        file.write(b"".join(parts))
        file.flush()
        return file

    # The archive is not compressed: the list's lines can be read out of it.
    script = ("for name in $(grep -aoP '[a-z]+\t-\tx$' {} | cut -f1); do "
              "echo \"@begin $name\"; [ $name = bad ] && exit; echo \"@end $name 10 10 0 abc\"; done")
    contestants.initrd = initrd
    contestants.programs.archive = lambda lines: b""
    guest = contestants.Guest("fake", lambda cpus, memory, initrd: ["sh", "-c", script.replace("{}", initrd)], 20)
    results = guest.run({name: f"{name}\t-\tx" for name in ("one", "bad", "two")}, 1)
    check("those around a crash", results["one"].problem is None and results["two"].problem is None)
    check("the crash", "crashed or hung" in results["bad"].problem)


def figures():
    samples = run.Samples(cpu_time=False)
    for native, guest, output in ((1.0, 2.0, "abc"), (1.0, 4.0, "abc"), (2.0, 16.0, "abc"), (1.0, 1.0, "wrong")):
        samples.rounds.append({})
        samples.note("native", "x", Result(native, native, "abc"))
        samples.note("direct", "x", Result(guest, guest, output), "abc")
    check("the median of the rounds that are right", samples.seconds("direct", "x") == 4.0)
    check("the median of ratios", samples.ratio("native", "direct", "x") == 0.25)
    check("a wrong result is told", len(samples.problems) == 1 and "something else" in samples.problems[0])
    check("nothing from nothing", samples.ratio("tcg", "direct", "x") is None)
    check("geometric mean", abs(run.mean([1.0, 4.0]) - 2) < 1e-9 and run.mean([1.0, None]) is None and run.mean([]) is None)


def bad_table():
    refused = subprocess.run([BENCH / "run", "--table", "/nothing"], capture_output=True, text=True, timeout=20)
    check("--table with no file is refused before the work", refused.returncode == 2 and "/nothing" in refused.stderr)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    reading()
    restarting()
    figures()
    bad_table()
