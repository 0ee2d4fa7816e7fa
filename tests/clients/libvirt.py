#!/usr/bin/env python3
"""libvirt as it is, its daemon under `anykvm run`: it finds KVM, starts a guest, stops and goes on with it, saves and restores it,
and migrates it to a second daemon in another network namespace. As an ordinary user, in a folder of its own.

When started by root the two namespaces have a link, which the migration goes over; else a socket of the file system does.
"""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "system"))
import harness  # noqa: E402
from harness import check  # noqa: E402

NOBODY = 65534

GUEST = """
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 panic=-1</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='host-passthrough' migratable='on'/>
  <devices>
    <serial type='file'><source path='{console}' append='on'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""

# Memory keeps what is in it while the guest is saved and moved.
TASK = """
dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2>/dev/null
sum=$(md5sum < /tmp/noise)
n=0
while true; do
  n=$((n + 1))
  [ "$(md5sum < /tmp/noise)" = "$sum" ] && echo "count $n"
done
"""


class Daemon:
    """A libvirtd of a user's session, with files and sockets of its own."""

    def __init__(self, options, folder, name):
        self.home = folder / name
        (self.home / "config/libvirt").mkdir(parents=True)
        (self.home / "run").mkdir()
        # Two daemons on one host are two hosts to libvirt.
        (self.home / "libvirtd.conf").write_text(f'host_uuid = "4a9ac3e4-0000-4000-8000-{len(name):012}"\n')
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        for variable, part in (("XDG_RUNTIME_DIR", "run"), ("XDG_CACHE_HOME", "cache"), ("XDG_CONFIG_HOME", "config")):
            self.environment[variable] = str(self.home / part)
        own(folder)
        self.log = open(self.home / "log", "w")
        self.process = subprocess.Popen(
            [*own_network(), *as_user(), str(options.anykvm), "run", "--engine", options.engine, "--", "libvirtd", "--config",
             str(self.home / "libvirtd.conf")],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.socket = self.home / "run/libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        while not self.socket.exists():
            self.check(self.process.poll() is None, "libvirtd ended at its start")
            time.sleep(0.05)

    def check(self, condition, what):
        check(condition, what, harness.Run(self.process.poll(), "", (self.home / "log").read_text()[-4000:], 0))

    def virsh(self, *arguments):
        done = subprocess.run([*as_user(), "virsh", "-q", "-c", self.uri, *arguments], env=self.environment, capture_output=True,
                              text=True, timeout=200)
        self.check(done.returncode == 0, f"virsh {arguments[0]}: {done.stderr}")
        return done.stdout

    def end(self):
        subprocess.run([*as_user(), "virsh", "-q", "-c", self.uri, "destroy", "guest"], env=self.environment, capture_output=True)
        self.process.terminate()
        self.process.wait(60)


def as_user():
    """libvirt's session mode is not root's."""
    return ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"] if os.getuid() == 0 else []


@functools.cache
def own_network():
    """What starts a program in a network namespace of its own; nothing where there cannot be one."""
    line = ["unshare", "--net"] if os.getuid() == 0 else ["unshare", "--user", "--map-current-user", "--net"]
    return line if subprocess.run([*line, "true"], capture_output=True).returncode == 0 else []


def connect(one, two):
    """A link between the networks of two daemons; the address of the second."""
    ours, theirs = ("10.77.0.1", "10.77.0.2")
    enter = {daemon: ["nsenter", "--net", "--target", str(daemon.process.pid)] for daemon in (one, two)}
    subprocess.run([*enter[one], "ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns",
                    str(two.process.pid)], check=True)
    for daemon, address in ((one, ours), (two, theirs)):
        subprocess.run([*enter[daemon], "ip", "address", "add", f"{address}/24", "dev", "wire"], check=True)
        subprocess.run([*enter[daemon], "ip", "link", "set", "wire", "up"], check=True)
    return theirs


def own(folder):
    if os.getuid() != 0:
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


class Console:
    def __init__(self, path):
        self.path = path

    def last(self):
        return int((["0"] + re.findall(r"count (\d+)\n", self.path.read_text(errors="replace").replace("\r", "")))[-1])

    def counts_on(self, seconds=100):
        """Waits until the guest has counted three times more."""
        begin, end = self.last(), time.monotonic() + seconds
        while self.last() < begin + 3:
            check(time.monotonic() < end, f"the guest does not count on behind {begin}")
            time.sleep(0.1)


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="direct")
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    for program in ("libvirtd", "virsh", "qemu-system-x86_64", "setpriv", "unshare", "nsenter", "ip"):
        if not shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin"):
            print(f"{program} is not there; scripts/setup test installs it")
            sys.exit(harness.SKIPPED)
    os.environ["PATH"] += ":/usr/sbin"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kernel = folder / "vmlinuz"
        guest = harness.Guest("6.1")
        shutil.copy(guest.vmlinuz, kernel)
        initrd = harness.write_initrd(folder, guest, TASK)
        console = Console(folder / "console")
        console.path.touch()
        (folder / "guest.xml").write_text(GUEST.format(kernel=kernel, initrd=initrd, console=console.path))
        one = two = None
        try:
            one = Daemon(options, folder, "a")
            check("<domain>kvm</domain>" in one.virsh("domcapabilities", "--virttype", "kvm"), "libvirt does not offer kvm")
            one.virsh("create", str(folder / "guest.xml"))
            console.counts_on()
            one.virsh("suspend", "guest")
            still = console.last()
            time.sleep(1)
            check(console.last() == still, "a suspended guest goes on")
            one.virsh("resume", "guest")
            console.counts_on()
            one.virsh("save", "guest", str(folder / "saved"))
            one.virsh("restore", str(folder / "saved"))
            console.counts_on()
            two = Daemon(options, folder, "second")
            before = console.last()
            networks = [os.stat(f"/proc/{daemon.process.pid}/ns/net").st_ino for daemon in (one, two)]
            check(not own_network() or networks[0] != networks[1], "both daemons are in one network")
            by_link = own_network() and os.getuid() == 0
            way = f"tcp://{connect(one, two)}:49300" if by_link else f"unix://{folder}/migration"
            one.virsh("migrate", "--live", "--unsafe", "guest", two.uri, "--migrateuri", way)
            check("guest" in two.virsh("list", "--name") and "guest" not in one.virsh("list", "--name"), "the guest did not move")
            console.counts_on()
            check(console.last() > before, "the guest went back")
        finally:
            for daemon in (one, two):
                if daemon:
                    daemon.end()
    print(f"libvirt: {time.monotonic() - began:.1f} s")
    if not own_network():
        print("all of it passed, but in one network namespace: a second one is not allowed here")
        sys.exit(harness.SKIPPED)


if __name__ == "__main__":
    main()
