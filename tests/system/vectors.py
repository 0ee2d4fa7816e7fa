#!/usr/bin/env python3
"""Programs in a Linux guest use AVX-512 and the x87 unit and are switched: the guest has AVX-512 exactly where the host has."""

import pathlib

import harness
from harness import check

TASK = """
echo "== vectors"
/vector_state
grep -o -m1 avx512bw /proc/cpuinfo
echo "== dmesg"
dmesg
echo "== end"
"""


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--engine", default="interpret")
    parser.add_argument("--program", required=True, type=pathlib.Path, help="vector_state, as built for the guest")
    options, guest = harness.parse(parser)
    result = harness.boot(options.anykvm, guest, TASK, engine=options.engine, files={"vector_state": options.program})
    host_has = "avx512bw" in pathlib.Path("/proc/cpuinfo").read_text()
    expected = ["x87 good", *(["vectors good", "avx512bw"] if host_has else ["vectors none"])]
    found = result.section("vectors").split("\n")
    check([line for line in found if line] == expected, f"the program said {found}, not {expected}", result)
    harness.check_kernel_log(result)
    print(f"{options.engine}: {', '.join(expected[:2])}, {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
