#!/usr/bin/env python3
"""A Linux kernel boots to power-off: each CPU comes up, takes timer interrupts and IPIs; the kernel log is clean."""

import harness
from harness import check

# Wake-ups and function calls across CPUs: a pipe from each CPU to the next, whose reader sleeps before every line.
TASK = """
echo "== cpus"
nproc
cpus=$(nproc)
cpu=0
while [ $cpu -lt $cpus ]; do
  next=$(( (cpu + 1) % cpus ))
  taskset $((1 << cpu)) sh -c 'i=0; while [ $i -lt 20 ]; do echo $i; usleep 2000; i=$((i+1)); done' |
    taskset $((1 << next)) sh -c 'while read -r line; do :; done'
  cpu=$((cpu + 1))
done
echo "== interrupts"
cat /proc/interrupts
echo "== clocksource"
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
echo "== dmesg"
dmesg
echo "== end"
"""


def interrupt_counts(table):
    """{"LOC": [per CPU], ...} from /proc/interrupts."""
    lines = table.splitlines()
    cpus = len(lines[0].split())
    counts = {}
    for line in lines[1:]:
        name, _, rest = line.partition(":")
        fields = rest.split()[:cpus]
        if len(fields) == cpus and all(field.isdigit() for field in fields):
            counts[name.strip()] = [int(field) for field in fields]
    return counts


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--engine", default="interpret")
    parser.add_argument("--format", choices=["bzimage", "pvh"], default="bzimage")
    parser.add_argument("--timeout", type=int, default=600, help="seconds until the guest is given up")
    options, guest = harness.parse(parser)
    kernel = guest.vmlinux if options.format == "pvh" else guest.vmlinuz

    result = harness.boot(options.anykvm, guest, TASK, kernel=kernel, cpus=options.cpus, engine=options.engine,
                          timeout=options.timeout)
    check(result.section("cpus").strip() == str(options.cpus), f"not {options.cpus} CPUs came up", result)
    result.section("end")
    harness.check_kernel_log(result)

    counts = interrupt_counts(result.section("interrupts"))
    for cpu in range(options.cpus):
        check(counts["LOC"][cpu] > 0, f"CPU {cpu} took no timer interrupt: {counts['LOC']}", result)
        ipis = counts["RES"][cpu] + counts["CAL"][cpu]
        check(options.cpus == 1 or ipis > 0, f"CPU {cpu} took no IPI: RES {counts['RES']}, CAL {counts['CAL']}", result)
    check(counts["NMI"] == [0] * options.cpus, f"stray NMIs: {counts['NMI']}", result)
    check(counts.get("ERR", [0])[0] == 0, "APIC errors", result)
    print(f"{options.guest} {options.format}, {options.cpus} CPUs: {result.seconds:.1f} s, "
          f"clock source {result.section('clocksource').strip()}, "
          f"LOC {counts['LOC']}, RES {counts['RES']}, CAL {counts['CAL']}")


if __name__ == "__main__":
    main()
