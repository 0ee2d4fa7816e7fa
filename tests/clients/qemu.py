#!/usr/bin/env python3
"""QEMU as it is, with -accel kvm under `anykvm run`: a Linux guest boots on each machine, from its kernel file, to power-off."""

import tempfile

import qemu_machine
from qemu_machine import harness

check = harness.check

TASK = """
echo "== cpus"
nproc
echo "== hypervisor"
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
echo "== dmesg"
dmesg
echo "== end"
"""


def launcher(options):
    if options.watch:
        return ["env", f"LD_PRELOAD={options.watch}", f"ANYKVM_ENGINE={options.engine}", "RUN_PATH_LEAST=1000"]
    return [str(options.anykvm), "run", "--engine", options.engine, "--"]


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="direct")
    parser.add_argument("--watch", help="instead of `anykvm run`: LD_PRELOAD with tests/preload/run_path.c in front")
    parser.add_argument("--guest", default="6.1", help="of scripts/fetch-guests")
    parser.add_argument("--machine", default="q35")
    parser.add_argument("--cpu", default="host", help="CPU model")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--irqchip", choices=["on", "split", "off"], default="on")
    options = parser.parse_args()
    qemu = qemu_machine.require()
    harness.require_tool(options.anykvm)
    guest = harness.Guest(options.guest)
    with tempfile.TemporaryDirectory() as folder:
        initrd = harness.write_initrd(folder, guest, TASK)
        result = harness.run(
            [*launcher(options), qemu, "-accel", f"kvm,kernel-irqchip={options.irqchip}", "-M", options.machine, "-cpu", options.cpu, "-m", "512", "-smp", str(options.cpus), "-nodefaults", "-no-user-config",
             "-display", "none", "-serial", "stdio", "-no-reboot",
             "-kernel", str(guest.vmlinuz), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1"], 280)
    check(result.status == 0, "QEMU did not end in good order", result)
    check("== end" in result.console, "the guest did not come to its task's end", result)
    check(result.section("cpus").strip() == str(options.cpus), f"not {options.cpus} CPUs came up", result)
    check(result.section("hypervisor").strip() == "kvm-clock", "the guest does not use KVM's clock", result)
    harness.check_kernel_log(result)
    print(f"{options.machine}, irqchip {options.irqchip}, {options.cpus} CPUs: {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
