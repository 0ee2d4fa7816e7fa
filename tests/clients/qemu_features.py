#!/usr/bin/env python3
"""What QEMU does with a virtual machine beside running it, and the devices that it emulates, with -accel kvm under `anykvm run`.

Each test is a function; its name is the argument.
"""

import argparse
import hashlib
import itertools
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time

import qemu_machine
from qemu_machine import Machine, accelerated, harness

sys.path.insert(0, str(harness.ROOT / "scripts/lib"))
from grub_disk import make_disk  # noqa: E402

MIB = 1 << 20
FIRMWARE = pathlib.Path("/usr/share/OVMF")

# Counts on the console as long as memory and disk keep what is written to them.
COUNTER = """
dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2>/dev/null
sum=$(md5sum < /tmp/noise)
n=0
while true; do
  n=$((n + 1))
  cp /tmp/noise /tmp/copy
  [ "$(md5sum < /tmp/copy)" = "$sum" ] || echo "memory lost"
  if [ -b /dev/vda ]; then
    dd if=/tmp/noise of=/dev/vda bs=64k count=16 conv=notrunc,fsync 2>/dev/null
    echo 1 > /proc/sys/vm/drop_caches
    dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp -n 1048576 - /tmp/noise || echo "disk lost"
  fi
  echo "count $n ok"
done
"""


def direct(options, folder, task, guest=None):
    """A kernel from its file, with a task."""
    guest = guest or harness.Guest("6.1")
    initrd = harness.write_initrd(folder, guest, task)
    return ["-kernel", str(guest.vmlinuz), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1"]


def drive(path, kind="virtio", form="raw"):
    return ["-drive", f"file={path},format={form},if={kind}"]


def count(machine, begin, more=3):
    """Waits until the guest has counted on behind a position of the console: the first number and the last."""
    machine.wait_for(" ok\n", begin)
    machine.wait_for("count ", begin)
    first = int(re.compile(r"^count (\d+) ok\n", re.MULTILINE).search(machine.console, begin).group(1))
    machine.wait_for(f"count {first + more} ok\n", begin)
    machine.check(" lost" not in machine.console, "the guest lost something")
    return first, first + more


def task_result(machine, seconds=280):
    """The console of a machine whose task has ended."""
    machine.end(seconds)
    result = harness.Run(0, machine.console, "", time.monotonic() - machine.began)
    result.section("end")
    harness.check_kernel_log(result)
    return result


REPORT = """
echo "== dmesg"
dmesg
echo "== end"
"""


def virtio(options, folder):
    """Disk, network and entropy source, all virtio."""
    content = random.Random(1).randbytes(8 * MIB)
    disk = folder / "disk"
    disk.write_bytes(content)
    task = """
echo "== disk"
md5sum < /dev/vda
dd if=/dev/vda of=/tmp/first bs=1M count=1 2>/dev/null
dd if=/tmp/first of=/dev/vda bs=1M seek=5 conv=notrunc,fsync 2>/dev/null
echo "== network"
ping -c 1 -W 60 10.0.2.2 > /dev/null && echo up
echo "== entropy"
cat /sys/class/misc/hw_random/rng_current
dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum
dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum
""" + REPORT
    line = [*accelerated(options), *direct(options, folder, task), *drive(disk), "-netdev", "user,id=n", "-device",
            "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci"]
    with Machine(folder, "qemu", line) as machine:
        result = task_result(machine)
    harness.check(hashlib.md5(content).hexdigest() in result.section("disk"), "the guest read other bytes", result)
    harness.check(disk.read_bytes()[5 * MIB : 6 * MIB] == content[:MIB], "the disk has not what the guest wrote", result)
    harness.check(result.section("network").strip() == "up", "the network does not answer", result)
    current, first, second = result.section("entropy").splitlines()[:3]
    harness.check(current.startswith("virtio_rng") and first != second, "the entropy source", result)


def listener(path):
    """A socket that QEMU connects to."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)
    server.settimeout(60)
    return server


def virtio_console(options, folder):
    """The kernel's messages and a line of input on hvc0; a megabyte each way through a port."""
    task = """
echo "== console"
exec 3<>/dev/hvc0
stty -echo <&3
echo "<0>by way of the kernel" > /dev/kmsg
echo "what?" >&3
read line <&3
echo "$line"
echo "== port"
port=/dev/$(basename /sys/class/virtio-ports/vport*p2)
head -c 1048576 $port > /tmp/noise
md5sum < /tmp/noise
cat /tmp/noise /tmp/noise > $port
""" + REPORT
    guest = harness.Guest("6.1-generic")
    initrd = harness.write_initrd(folder, guest, task)
    line = [*accelerated(options), "-kernel", str(guest.vmlinuz), "-initrd", str(initrd), "-append",
            "console=hvc0 console=ttyS0 panic=-1", "-device", "virtio-serial-pci"]
    listeners = []
    for number, device in ((1, "virtconsole"), (2, "virtserialport")):
        listeners.append(listener(folder / device))
        line += ["-chardev", f"socket,id=c{number},path={folder / device}", "-device", f"{device},chardev=c{number},nr={number}"]
    noise = random.Random(2).randbytes(MIB)
    with Machine(folder, "qemu", line) as machine:
        console, port = (server.accept()[0] for server in listeners)
        for link in (console, port):
            link.settimeout(120)
        shown = read_until(console, b"what?\r\n")
        machine.check(b"] by way of the kernel\r\n" in shown, "hvc0 does not show the kernel's messages")
        console.sendall(b"all is well\n")
        port.sendall(noise)
        back = b""
        while len(back) < 2 * MIB:
            back += port.recv(MIB)
        machine.check(back == 2 * noise, "the port brings other bytes")
        result = task_result(machine)
    harness.check(result.section("console").endswith("\nall is well\n"), "the guest read another line", result)
    harness.check(hashlib.md5(noise).hexdigest() in result.section("port"), "the guest read other bytes", result)


def read_until(link, end):
    got = b""
    while not got.endswith(end):
        part = link.recv(1 << 16)
        harness.check(part, f"the link ended behind {got[-200:]}")
        got += part
    return got


def grub(options, folder, kind):
    """SeaBIOS, GRUB and Linux from a disk."""
    guest = harness.Guest("6.1")
    initrd = harness.write_initrd(folder, guest, REPORT)
    script = """
serial --unit=0 --speed=115200
terminal_output serial
echo GRUB is up
linux (hd0,msdos1)/vmlinuz console=ttyS0 panic=-1
initrd (hd0,msdos1)/initrd
boot
"""
    disk = folder / "disk"
    disk.write_bytes(make_disk(script, {"vmlinuz": guest.vmlinuz.read_bytes(), "initrd": initrd.read_bytes()}))
    with Machine(folder, "qemu", [*accelerated(options, "pc"), *drive(disk, kind)]) as machine:
        machine.wait_for("GRUB is up")
        task_result(machine)


def grub_virtio(options, folder):
    grub(options, folder, "virtio")


def grub_ide(options, folder):
    grub(options, folder, "ide")


def ovmf(options, folder):
    """UEFI firmware, which starts the kernel as an EFI program. Its first stages are 32-bit code and take their time."""
    if not (FIRMWARE / "OVMF_CODE_4M.fd").exists():
        print("no OVMF here; scripts/setup test installs it (package ovmf)")
        sys.exit(harness.SKIPPED)
    variables = folder / "vars"
    variables.write_bytes((FIRMWARE / "OVMF_VARS_4M.fd").read_bytes())
    task = "echo == efi; ls -d /sys/firmware/efi\n" + REPORT
    # The 32-bit stages map as much as the CPU can address: with the host's 48 bits they need more memory than there is.
    line = [*accelerated(options, cpu="host,host-phys-bits=off,phys-bits=40"), "-drive",
            f"if=pflash,format=raw,readonly=on,file={FIRMWARE}/OVMF_CODE_4M.fd", "-drive",
            f"if=pflash,format=raw,file={variables}", "-device", "virtio-rng-pci", *direct(options, folder, task)]
    with Machine(folder, "qemu", line) as machine:
        result = task_result(machine, 800)
    harness.check("/sys/firmware/efi" in result.section("efi"), "the guest does not know that it runs on UEFI", result)


def network_boot(options, folder, card):
    """iPXE loads Linux over the network by the card's own driver."""
    guest = harness.Guest("6.1")
    harness.write_initrd(folder, guest, REPORT)
    (folder / "vmlinuz").write_bytes(guest.vmlinuz.read_bytes())
    (folder / "script").write_text("#!ipxe\nkernel vmlinuz console=ttyS0 panic=-1 initrd=initrd\ninitrd initrd\nboot\n")
    line = [*accelerated(options, "pc"), "-netdev", f"user,id=n,tftp={folder},bootfile=script", "-device",
            f"{card},netdev=n,bootindex=0"]
    with Machine(folder, "qemu", line) as machine:
        task_result(machine)


def e1000(options, folder):
    network_boot(options, folder, "e1000")


# What it is told on the console is a way to reboot, as /sys/kernel/reboot/type knows them.
REBOOTER = """
stty -echo
echo up
read way
echo "$way" > /sys/kernel/reboot/type
reboot -f
"""


def reset(options, folder):
    """The machine starts again and again from its firmware on, by the monitor and by the guest, and leaves nothing behind."""
    # What is there of the guest's memory and of translated code must not hide what else grows: all of the one is resident from
    # the start, the other is full soon, as the kernel lies elsewhere after each reset.
    os.environ["ANYKVM_CODE_CACHE"] = "16"
    line = [*accelerated(options), "-object", "memory-backend-ram,id=ram,size=256M,prealloc=on", "-machine", "memory-backend=ram",
            "-smp", "2", *direct(options, folder, REBOOTER)]
    guest_ways = itertools.cycle(["acpi", "kbd", "triple", "pci"])
    with Machine(folder, "qemu", line) as machine:
        at = machine.wait_for("up\n")
        for number in range(1, options.resets + 1):
            if number % 6:
                machine.command("system_reset")
            else:
                machine.type(next(guest_ways) + "\n")
            at = machine.wait_for("up\n", at)
            if number == options.resets // 2:
                half = machine.resources()
            if number % 10 == 0:
                print(f"{number} resets: %d descriptors, %d threads, %d MiB" % machine.resources(), flush=True)
        end = machine.resources()
        machine.check(end[:2] == half[:2], f"descriptors and threads were {half[:2]} and are {end[:2]}")
        machine.check(end[2] < half[2] + 64, f"{half[2]} MiB were resident and {end[2]} are")
        machine.command("quit")
        machine.end()


def stop(options, folder):
    """The guest stands still between stop and cont."""
    with Machine(folder, "qemu", [*accelerated(options), "-smp", "2", *direct(options, folder, COUNTER)]) as machine:
        count(machine, 0)
        for _ in range(3):
            machine.command("stop")
            time.sleep(0.2)
            at = len(machine.console)
            time.sleep(1)
            machine.check(len(machine.console) == at, "a stopped guest goes on")
            machine.command("cont")
            count(machine, at)
        machine.command("quit")
        machine.end()


def snapshot(options, folder):
    """savevm, and loadvm into the same QEMU and into a new one."""
    disk = folder / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    line = [*accelerated(options), "-smp", "2", *direct(options, folder, COUNTER), *drive(disk, form="qcow2")]
    with Machine(folder, "qemu", line) as machine:
        count(machine, 0)
        machine.human("savevm here")
        _, saved = count(machine, len(machine.console))
        for _ in range(2):
            at = len(machine.console)
            machine.human("loadvm here")
            again, _ = count(machine, at)
            machine.check(again <= saved, "loadvm does not go back")
        machine.command("quit")
        machine.end()
    with Machine(folder, "second", [*line, "-loadvm", "here"]) as machine:
        machine.check(count(machine, 0)[0] <= saved, "-loadvm does not go back")
        machine.command("quit")
        machine.end()


def migration(options, folder):
    """To a second QEMU while the guest writes memory and its disk."""
    disk = folder / "disk"
    disk.write_bytes(bytes(64 * MIB))
    line = [*accelerated(options), "-smp", "2", *direct(options, folder, COUNTER), *drive(disk)]
    socket_path = f"unix:{folder}/migration"
    with Machine(folder, "source", line) as source, Machine(folder, "target", [*line, "-incoming", socket_path]) as target:
        _, counted = count(source, 0)
        source.command("migrate", uri=socket_path)
        while (status := source.command("query-migrate").get("status")) not in ("completed", "failed"):
            time.sleep(0.1)
        source.check(status == "completed", f"the migration's status is '{status}'")
        first, _ = count(target, 0, 5)
        target.check(first >= counted, "the guest went back")
        source.command("quit")
        source.end()
        target.command("quit")
        target.end()


def postcopy(options, folder):
    """The guest runs on the second QEMU before its memory is there: the pages come as they are asked for."""
    line = [*accelerated(options), "-smp", "2", *direct(options, folder, COUNTER)]
    socket_path = f"unix:{folder}/migration"
    capabilities = [{"capability": "postcopy-ram", "state": True}]
    with Machine(folder, "source", line) as source, Machine(folder, "target", [*line, "-incoming", "defer"]) as target:
        _, counted = count(source, 0)
        for machine in (source, target):
            machine.command("migrate-set-capabilities", capabilities=capabilities)
        source.command("migrate-set-parameters", **{"max-bandwidth": 4 * MIB})  # so that it does not end before
        target.command("migrate-incoming", uri=socket_path)
        source.command("migrate", uri=socket_path)
        while source.command("query-migrate").get("status") not in ("active", "failed"):
            time.sleep(0.05)
        source.command("migrate-start-postcopy")
        while (status := source.command("query-migrate").get("status")) not in ("completed", "failed"):
            if status == "postcopy-active":
                source.command("migrate-set-parameters", **{"max-bandwidth": 1024 * MIB, "max-postcopy-bandwidth": 0})
            time.sleep(0.1)
        source.check(status == "completed", f"the migration's status is '{status}'")
        first, _ = count(target, 0, 5)
        target.check(first >= counted, "the guest went back")
        source.command("quit")
        source.end()
        target.command("quit")
        target.end()


class Debugger:
    """The little of GDB's remote protocol that the test needs."""

    def __init__(self, path):
        self.link = socket.socket(socket.AF_UNIX)
        self.link.settimeout(60)
        self.link.connect(path)
        self.buffer = b""
        self.receive()  # QEMU stops the guest for whoever comes, and says so

    def send(self, packet):
        self.link.sendall(b"$" + packet + b"#%02x" % (sum(packet) % 256))

    def receive(self):
        while not (found := re.match(rb"\+*\$([^#]*)#..", self.buffer)):
            self.buffer += self.link.recv(4096)
        self.buffer = self.buffer[found.end() :]
        self.link.sendall(b"+")
        return found.group(1)

    def ask(self, packet):
        self.send(packet)
        return self.receive()

    def rip(self):
        registers = bytes.fromhex(self.ask(b"g").decode())
        return int.from_bytes(registers[16 * 8 : 17 * 8], "little")


def gdbstub(options, folder):
    """A debugger stops the guest, steps it, and meets breakpoints of both kinds."""
    path = f"{folder}/gdb"
    line = [*accelerated(options), "-chardev", f"socket,id=g,path={path},server=on,wait=off", "-gdb", "chardev:g",
            *direct(options, folder, "grep -w do_syscall_64 /proc/kallsyms\n" + COUNTER)]
    with Machine(folder, "qemu", line) as machine:
        count(machine, 0)
        debugger = Debugger(path)
        machine.check(debugger.ask(b"?").startswith(b"T"), "the guest does not stop when a debugger comes")
        seen = set()
        for _ in range(20):
            machine.check(debugger.ask(b"s").startswith(b"T05"), "a step does not end as one")
            seen.add(debugger.rip())
        machine.check(len(seen) > 3, f"steps go nowhere: {seen}")
        target = int(re.search(r"([0-9a-f]{16}) T do_syscall_64\n", machine.console).group(1), 16)
        for kind in (b"0", b"1"):
            for _ in range(3):
                machine.check(debugger.ask(b"Z%s,%x,1" % (kind, target)) == b"OK", "a breakpoint is refused")
                machine.check(debugger.ask(b"c").startswith(b"T05"), "a breakpoint does not end as one")
                machine.check(debugger.rip() == target, f"stopped at {debugger.rip():x} instead of {target:x}")
                machine.check(debugger.ask(b"z%s,%x,1" % (kind, target)) == b"OK", "a breakpoint does not go")
                debugger.ask(b"s")
        debugger.send(b"c")
        count(machine, len(machine.console))
        machine.command("quit")
        machine.end()


def descendants(pid):
    """Processes that have been forked by one, or by those."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def user_code(options, folder):
    """User code runs natively with the RAM that QEMU has by default, and translated where QEMU's sandbox lets it fork nothing; what has
    been forked does not outlive a QEMU that is killed."""
    line = [*accelerated(options), *direct(options, folder, COUNTER)]
    line.insert(line.index("--"), "--stats")
    with Machine(folder, "qemu", line) as machine:
        count(machine, 0)
        machine.command("quit")
        machine.end()
        machine.wait_for("guest RAM moved to files: 256 MiB")
        machine.wait_for("native_stretches")
    sandbox = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    with Machine(folder, "sandboxed", [*line, *sandbox]) as machine:
        count(machine, 0)
        machine.command("quit")
        machine.end()
        machine.wait_for("user code is translated: a seccomp filter of the client's")
        machine.check("native_stretches" not in machine.console and "RAM moved" not in machine.console, "it is not left alone")
    with Machine(folder, "killed", line) as machine:
        at = 0
        while not (forked := descendants(machine.process.pid)):
            at = machine.wait_for(" ok\n", at)
        machine.process.kill()
        machine.process.wait()
        deadline = time.monotonic() + 10
        while alive := forked & descendants(1):
            harness.check(time.monotonic() < deadline, f"processes outlive QEMU: {alive}")
            time.sleep(0.05)


TESTS = [virtio, virtio_console, grub_virtio, grub_ide, ovmf, e1000, reset, stop, snapshot, migration, postcopy, gdbstub, user_code]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anykvm", required=True, type=pathlib.Path, help="the anykvm command under test")
    parser.add_argument("--engine", default="direct")
    parser.add_argument("--resets", type=int, default=24, help="of the test `reset`; the monitor does five of six")
    parser.add_argument("test", choices=[test.__name__ for test in TESTS])
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    qemu_machine.require()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        next(test for test in TESTS if test.__name__ == options.test)(options, pathlib.Path(folder))
    print(f"{options.test}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
