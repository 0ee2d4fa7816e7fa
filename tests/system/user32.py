#!/usr/bin/env python3
"""A 32-bit program under a 64-bit kernel: system calls, a thread-local segment, signals, x87, loops."""

import pathlib

import harness
from harness import check

EXPECTED = """sieve 00014069
fibonacci 0002ff42
mix 90ea1882
floating 15e70621
thread 0181ffdd
vdso 000003e8
signal 0000000b
child 00000700
"""

TASK = """
echo "== program"
/user32
echo "== dmesg"
dmesg
echo "== end"
"""


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--engine", default="interpret")
    parser.add_argument("--program", required=True, type=pathlib.Path, help="user32, as built for the guest")
    options, guest = harness.parse(parser)
    result = harness.boot(options.anykvm, guest, TASK, engine=options.engine, files={"user32": options.program})
    found = result.section("program")
    check(found.strip() == EXPECTED.strip(), f"the program said\n{found}\nnot\n{EXPECTED}", result)
    harness.check_kernel_log(result)
    print(f"{options.engine}: {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
