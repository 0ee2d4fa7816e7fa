#!/usr/bin/env python3
"""Linux boots to userspace with every instruction of the translator compared with the reference engine's."""

import hashlib

import harness
from harness import check

TASK = """
echo "== user"
echo compared | gzip -9 | gzip -d | sha256sum
echo "== dmesg"
dmesg
echo "== end"
"""


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=1)
    options, guest = harness.parse(parser)
    # A guest that is this slow need not test its own ciphers, nor take its CPUs or tasks for stuck.
    patience = "cryptomgr.notests nowatchdog rcupdate.rcu_cpu_stall_suppress=1 sysctl.kernel.hung_task_timeout_secs=0"
    result = harness.boot(options.anykvm, guest, TASK, cpus=options.cpus, engine="lockstep", timeout=850, append=patience)
    expected = hashlib.sha256(b"compared\n").hexdigest()
    check(result.section("user").split()[0] == expected, "the guest's user code went wrong", result)
    result.section("end")
    print(f"{options.guest} with {options.cpus} CPUs in {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
