#!/usr/bin/env python3
"""An idle guest leaves the host alone: less than 3 % of a core while all its CPUs wait."""

import os
import tempfile
import time

import harness
from harness import check

LIMIT = 0.03
TASK = """
echo "== idle"
sleep 60
"""


def cpu_seconds(pid):
    """User and system time that the process has used, from /proc/PID/stat."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=1)
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    guest = harness.Guest("6.1")
    with tempfile.TemporaryDirectory() as folder:
        initrd = harness.write_initrd(folder, guest, TASK)
        process = harness.start(harness.command(options.anykvm, kernel=guest.vmlinuz, initrd=initrd, cpus=options.cpus,
                                                net="user", timeout=300))
        try:
            console = ""
            for line in process.stdout:
                console += harness.text(line)
                if line.startswith(b"== idle"):
                    break
            check(process.poll() is None, f"the guest ended early\n{console[-3000:]}")
            time.sleep(2)  # what a boot leaves behind: deferred work, the first writebacks
            shares = []
            for _ in range(6):
                before, begin = cpu_seconds(process.pid), time.monotonic()
                time.sleep(5)
                shares.append((cpu_seconds(process.pid) - before) / (time.monotonic() - begin))
                if shares[-1] < LIMIT:
                    break
            check(shares[-1] < LIMIT, f"an idle guest uses {[f'{share:.1%}' for share in shares]} of a core")
            print(f"idle with {options.cpus} CPUs: {shares[-1]:.1%} of a core")
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
