#!/usr/bin/env python3
"""Debian 12 on a virtio disk in an unmodified QEMU, -accel kvm under `anykvm run`: by GRUB to a login, a compiler installed by apt
over the network, a program compiled with it, and to power-off with a clean file system."""

import functools
import http.server
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import qemu_machine
from qemu_machine import Machine, accelerated, harness

sys.path.insert(0, str(harness.ROOT / "scripts/lib"))
import grub_disk  # noqa: E402

DEBIAN = harness.ROOT / "cache/debian"

# Prints the square root of the sum of 0.5 + 1.5 + ... + 9999.5, and how long that is as text.
PROGRAM = """
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(void) {
  double* numbers = malloc(10000 * sizeof *numbers);
  double sum = 0;
  for (int i = 0; i < 10000; ++i) numbers[i] = i + 0.5;
  for (int i = 0; i < 10000; ++i) sum += numbers[i];
  char text[64];
  snprintf(text, sizeof text, "%.1f", sqrt(sum));
  printf("%s %zu\\n", text, strlen(text));
  return 0;
}
"""
PRINTS = "7071.1 6"


class Repository(http.server.SimpleHTTPRequestHandler):
    fetched = set()

    def log_message(self, *unused):
        pass

    def do_GET(self):
        self.fetched.add(self.path)
        super().do_GET()


class Shell:
    """A shell on the machine's console that neither echoes nor prompts."""

    def __init__(self, machine):
        self.machine = machine
        self.times = []
        machine.type("\n")
        at = machine.wait_for("login: ", machine.wait_for("login: "))
        machine.type("root\n")
        at = machine.wait_for("# ", at)
        machine.type("stty -echo; exec env PS1= PS2= sh\n")
        machine.type("echo shell is 'up'\n")
        self.at = machine.wait_for("shell is up\n", at)

    def run(self, name, command):
        """What a command prints; it must succeed."""
        began = time.monotonic()
        # The shell has read the whole line when the command starts, which could take the rest for its own input.
        self.machine.type(f"{{ {command}\n}} < /dev/null; echo \"== $? from {name}\"\n")
        end = self.machine.wait_for(f" from {name}\n", self.at, 500)
        output, _, result = self.machine.console[self.at : end].rpartition("== ")
        self.machine.check(result.startswith("0 "), f"{name} ends with status {result.split()[0]}")
        self.times.append(f"{name} {time.monotonic() - began:.1f}")
        self.at = end
        return output


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="direct")
    parser.add_argument("--cpus", type=int, default=1)
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    qemu_machine.require()
    if not (DEBIAN / "disk").exists():
        print("no Debian here; scripts/setup debian and scripts/fetch-debian make its disk")
        sys.exit(harness.SKIPPED)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Repository, directory=DEBIAN / "repository"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        disk = folder / "disk"
        subprocess.run(["cp", "--sparse=always", DEBIAN / "disk", disk], check=True)
        line = [*accelerated(options), "-m", "1024", "-smp", str(options.cpus), "-drive",
                f"file={disk},format=raw,if=virtio,cache=unsafe", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n",
                "-device", "virtio-rng-pci"]
        with Machine(folder, "qemu", line) as machine:
            machine.wait_for("GRUB is up")
            machine.wait_for("login: ")
            booted = time.monotonic() - machine.began
            shell = Shell(machine)
            state = shell.run("running", "systemctl is-system-running --wait").strip()
            machine.check(state == "running", f"systemd says '{state}'")
            shell.run("update", "rm -rf /etc/apt/sources.list*; export DEBIAN_FRONTEND=noninteractive; "
                      f"echo 'deb [trusted=yes] http://10.0.2.2:{server.server_port} ./' > /etc/apt/sources.list; apt-get update")
            shell.run("install", "apt-get install -y --no-install-recommends gcc libc6-dev")
            machine.check(any("/gcc-" in path for path in Repository.fetched), "apt did not fetch the compiler")
            shell.run("write", f"cat > sum.c <<'END'{PROGRAM}END")
            output = shell.run("compile", "gcc -O2 -Wall -o sum sum.c -lm && ./sum")
            machine.check(output.strip() == PRINTS, f"the program prints '{output.strip()}'")
            log = shell.run("dmesg", "echo == dmesg; dmesg")
            machine.type("systemctl poweroff\n")
            machine.end()
            harness.check_kernel_log(harness.Run(0, log, "", time.monotonic() - machine.began))
            machine.check("reboot: Power down" in machine.console, "the kernel did not power off")
        start = grub_disk.PARTITION_START * grub_disk.SECTOR
        checked = subprocess.run(["/sbin/e2fsck", "-fn", f"{disk}?offset={start}"], capture_output=True, text=True)
        report = checked.stdout + checked.stderr
        # It passes over a journal that is still to be replayed, but for a warning.
        harness.check(checked.returncode == 0 and "journal" not in report, f"the file system is not clean:\n{report}")
    print(f"Debian: login {booted:.1f} s, {', '.join(shell.times)}; {time.monotonic() - machine.began:.1f} s")


if __name__ == "__main__":
    main()
