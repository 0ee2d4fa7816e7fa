"""An unmodified QEMU under `anykvm run`, with its console and its monitor (QMP)."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "system"))
import harness  # noqa: E402


def require():
    """The path of QEMU; skips the test where there is none."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        print("qemu-system-x86_64 is not there; scripts/setup test installs it")
        sys.exit(harness.SKIPPED)
    return qemu


def accelerated(options, machine="q35", irqchip="on", cpu="host"):
    """QEMU's command line as far as every test has it."""
    return [str(options.anykvm), "run", "--engine", options.engine, "--", require(), "-accel", f"kvm,kernel-irqchip={irqchip}",
            "-M", machine, "-cpu", cpu, "-m", "256", "-nodefaults", "-no-user-config", "-display", "none"]


class Machine:
    """A QEMU that runs; its console is the serial port. Use as a context: leaving it ends QEMU."""

    def __init__(self, folder, name, line):
        self.path = pathlib.Path(folder) / f"{name}.qmp"
        self.console = ""
        self.began = time.monotonic()
        self.process = subprocess.Popen([*line, "-serial", "stdio", "-qmp", f"unix:{self.path},server=on,wait=off"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.more = threading.Condition()
        threading.Thread(target=self.read_console, daemon=True).start()
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.settimeout(120)
        while not self.connect():
            self.check(self.process.poll() is None, "QEMU ended at its start")
            time.sleep(0.01)
        self.replies = self.monitor.makefile()
        self.events = []
        self.replies.readline()
        self.command("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()

    def connect(self):
        try:
            self.monitor.connect(str(self.path))
            return True
        except (FileNotFoundError, ConnectionRefusedError):  # there a little before QEMU listens
            return False

    def read_console(self):
        while part := os.read(self.process.stdout.fileno(), 1 << 16):
            with self.more:
                self.console += part.decode(errors="replace").replace("\r", "")
                self.more.notify_all()

    def check(self, condition, what):
        harness.check(condition, what, harness.Run(self.process.poll(), self.console, "", time.monotonic() - self.began))

    def wait_for(self, text, begin=0, seconds=280):
        """Waits until the console shows `text` behind position `begin`; the position behind it."""
        with self.more:
            self.more.wait_for(lambda: text in self.console[begin:], seconds)
            at = self.console.find(text, begin)
        self.check(at >= 0, f"the console does not show '{text}'")
        return at + len(text)

    def type(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()
        # Where a driver has tested the serial port by its loopback, QEMU looks at its input again only when it wakes up for
        # something else.
        self.command("query-version")

    def command(self, name, **arguments):
        """A monitor command's return value. Events that come meanwhile are kept."""
        self.monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while True:
            reply = json.loads(self.replies.readline())
            if "event" in reply:
                self.events.append(reply["event"])
                continue
            self.check("return" in reply, f"{name}: {reply}")
            return reply["return"]

    def human(self, line):
        """A command of the human monitor; it must have nothing to say."""
        answer = self.command("human-monitor-command", **{"command-line": line})
        self.check(not answer.strip(), f"{line}: {answer}")

    def wait_for_event(self, name):
        while name not in self.events:
            reply = json.loads(self.replies.readline())
            if "event" in reply:
                self.events.append(reply["event"])
        self.events.remove(name)

    def descriptors(self):
        """What QEMU's descriptors stand for."""
        found = []
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{self.process.pid}/fd/{name}"))
            except FileNotFoundError:  # closed meanwhile
                pass
        return found

    def resources(self):
        """How many descriptors and threads QEMU has, without the three descriptors of each vCPU that has run user code natively; how
        many MiB are resident."""
        names = self.descriptors()
        natives = sum("anykvm user code" in name for name in names), sum("anykvm code" in name for name in names)
        folder = pathlib.Path(f"/proc/{self.process.pid}")
        resident = re.search(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
        return len(names) - 2 * natives[0] - natives[1], len(os.listdir(folder / "task")), int(resident[1]) >> 10

    def end(self, seconds=280):
        """Waits until QEMU ends by itself."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.check(False, "QEMU does not end")
        self.check(status == 0, "QEMU did not end in good order")
