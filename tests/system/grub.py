#!/usr/bin/env python3
"""The whole way of a PC: SeaBIOS loads GRUB from a disk, GRUB loads Linux from it, Linux uses that disk by virtio-pci."""

import hashlib
import pathlib
import shutil
import sys
import tempfile

import harness
from harness import check

sys.path.insert(0, str(harness.ROOT / "scripts/lib"))
from grub_disk import make_disk  # noqa: E402

FIRMWARE = pathlib.Path("/usr/share/seabios/bios-256k.bin")
GRUB = pathlib.Path("/usr/lib/grub/i386-pc")

SCRIPT = """
serial --unit=0 --speed=115200
terminal_output serial
echo GRUB is up
linux (hd0,msdos1)/vmlinuz console=ttyS0 panic=-1
initrd (hd0,msdos1)/initrd
boot
"""

TASK = """
echo "== cpus"
nproc
echo "== disk"
md5sum < /dev/vda
echo "== devices"
for device in /sys/bus/virtio/devices/*; do readlink -f "$device"; done
echo "== interrupts"
grep virtio /proc/interrupts
echo "== network"
ping -c 1 -W 60 10.0.2.2 > /dev/null && echo up
echo "== dmesg"
dmesg
echo "== end"
"""


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--engine", default="interpret")
    options, guest = harness.parse(parser)
    if not (FIRMWARE.exists() and GRUB.exists() and shutil.which("grub-mkimage")):
        print("no SeaBIOS or no GRUB here; scripts/setup test installs them (packages seabios, grub-common, grub-pc-bin)")
        sys.exit(harness.SKIPPED)

    with tempfile.TemporaryDirectory() as folder:
        initrd = harness.write_initrd(folder, guest, TASK)
        disk = pathlib.Path(folder) / "disk"
        disk.write_bytes(make_disk(SCRIPT, {"vmlinuz": guest.vmlinuz.read_bytes(), "initrd": initrd.read_bytes()}))
        content = hashlib.md5(disk.read_bytes()).hexdigest()
        result = harness.run([str(options.anykvm), "boot", "--engine", options.engine, "--firmware", str(FIRMWARE),
                              "--disk", f"{disk},ro", "--cpus", str(options.cpus), "--net", "user", "--timeout", "500"])
    check(result.status == 0, "the guest did not power off in good order", result)
    for stage in ("SeaBIOS (version", "GRUB is up"):
        check(stage in result.console, f"never came to '{stage}'", result)
    check(result.section("cpus").strip() == str(options.cpus), f"not {options.cpus} CPUs came up", result)
    check(content in result.section("disk"), "the guest read other bytes than the image holds", result)
    check(result.section("devices").count("/pci0000:00/") == 3, "disk, network and entropy are not all on PCI", result)
    for line in result.section("interrupts").splitlines():
        check("IO-APIC" in line, f"an interrupt that does not come by the I/O APIC: {line}", result)
    check(result.section("network").strip() == "up", "the network did not answer", result)
    result.section("end")
    harness.check_kernel_log(result)
    print(f"SeaBIOS, GRUB, {options.guest}: {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
