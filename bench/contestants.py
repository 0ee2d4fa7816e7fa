"""Who takes part: the host CPU, anykvm's engines, QEMU on anykvm and on its own TCG. Each runs a list of workloads and answers what each took."""

import dataclasses
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

import programs
from initramfs import Archive

ROOT = programs.ROOT
ANYKVM = ROOT / "build/release/bin/anykvm"
GUEST = ROOT / "cache/guests/6.1"
QEMU = "qemu-system-x86_64"

TASK = b"#!/bin/sh\ncd /bench && exec ./runner list /tmp\n"
INIT = b"#!/bin/sh\necho '@init'\nexec /bin/busybox poweroff -f\n"


@dataclasses.dataclass
class Result:
    seconds: float = None  # wall time; None: it crashed, hung or failed
    cpu_seconds: float = None  # of all the contestant's threads
    output: str = None  # hash of what it printed
    problem: str = None


class Console:
    """Lines of a process's output, each with the time of its arrival."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, **options)

    def lines(self, patience):
        """Ends with the process, or when it has said nothing for `patience` seconds."""
        pending, fd = b"", self.process.stdout.fileno()
        while select.select([fd], [], [], patience)[0]:
            got = os.read(fd, 65536)
            if not got:
                return
            now = time.monotonic()
            *complete, pending = (pending + got).split(b"\n")
            for line in complete:
                yield now, line.decode(errors="replace").strip()

    def cpu_seconds(self):
        """That all its threads together have had."""
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def collect(command, names, patience, guest, **options):
    """Runs the command, which runs these workloads, in a guest or itself; answers their results as far as it came, and its last lines."""
    results, last, begun = {}, [], {}
    console = Console(command, **options)
    try:
        for now, line in console.lines(patience):
            words = line[line.find("@"):].split() if "@" in line else []
            if words[:1] == ["@begin"] and len(words) == 2:
                begun[words[1]] = now, console.cpu_seconds()
            elif words[:1] == ["@end"] and len(words) == 6 and words[1] in begun:
                name, seconds, host = words[1], int(words[2]) / 1e9, now - begun[words[1]][0]
                cpu = console.cpu_seconds() - begun[words[1]][1] if guest else int(words[3]) / 1e9
                results[name] = Result(seconds, cpu, words[5])
                if words[4] != "0":
                    results[name] = Result(problem=f"ended with status {words[4]}: {' / '.join(last[-2:])}")
                # What the console costs is in the host's figure alone.
                elif abs(host - seconds) > 0.1 + 0.1 * host:
                    results[name].problem = f"the guest's clock says {seconds:.2f} s, the host's {host:.2f} s"
                if set(names) == set(results):
                    break
            last = [*last[-7:], line]
    finally:
        console.end()
    return results, last


class Native:
    name = "native"

    def run(self, lines, cpus):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
            path = pathlib.Path(folder, "list")
            path.write_text("\n".join(lines.values()) + "\n")
            # As many CPUs as the guests have.
            allowed = sorted(os.sched_getaffinity(0))[-cpus:]
            return collect([programs.TREE / "runner", path, folder], lines, 120, False, cwd=programs.TREE,
                           preexec_fn=lambda: os.sched_setaffinity(0, allowed))[0]


class Guest:
    """A machine that boots; `command(cpus, memory in MiB, initrd)` starts it with the console on its output."""

    def __init__(self, name, command, patience):
        self.name, self.command, self.patience = name, command, patience

    def run(self, lines, cpus):
        """A workload that crashes or hangs costs its own result; the others are run in another boot."""
        results, left = {}, dict(lines)
        while left:
            extra = Archive()
            extra.add_file("task", TASK, 0o755)
            extra.add_file("bench/list", ("\n".join(left.values()) + "\n").encode(), 0o644)
            with initrd(programs.archive(lines.values()), extra.finish()) as file:
                got, last = collect(self.command(cpus, 1024, file.name), left, self.patience, True)
            results.update(got)
            left = {name: line for name, line in left.items() if name not in got}
            if left:
                failed = next(iter(left))
                results[failed] = Result(problem=f"crashed or hung: {' / '.join(last)}")
                del left[failed]
        return results

    def boot(self):
        """Seconds from the process's start until the guest's init speaks; 1 CPU, 512 MiB."""
        extra = Archive()
        extra.add_file("init", INIT, 0o755)
        with initrd(extra.finish()) as file:
            begin = time.monotonic()
            console = Console(self.command(1, 512, file.name))
            try:
                for now, line in console.lines(self.patience):
                    if "@init" in line:
                        return Result(now - begin, console.cpu_seconds())
            finally:
                console.end()
        return Result(problem="never reached its init")


def initrd(*parts):
    file = tempfile.NamedTemporaryFile()
    for part in ((GUEST / "initrd").read_bytes(), *parts):
        file.write(part)
    file.flush()
    return file


def anykvm(engine):
    return lambda cpus, memory, initrd: [ANYKVM, "boot", "--quiet", "--engine", engine, "--memory", f"{memory}M", "--cpus", cpus,
                                         "--kernel", GUEST / "vmlinuz", "--initrd", initrd, "--append", "quiet"]


def qemu(accelerator, *launcher):
    return lambda cpus, memory, initrd: [*launcher, QEMU, "-accel", accelerator, "-cpu", "max", "-M", "q35", "-m", memory, "-smp", cpus,
                                         "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", GUEST / "vmlinuz",
                                         "-initrd", initrd, "-append", "console=ttyS0 quiet"]


NATIVE = Native()
GUESTS = {guest.name: guest for guest in (
    Guest("direct", anykvm("direct"), 300),
    Guest("translate", anykvm("translate"), 300),
    Guest("qemu", qemu("kvm", ANYKVM, "run", "--quiet", "--engine", "direct", "--"), 120),
    Guest("tcg", qemu("tcg,thread=multi"), 120),
    Guest("interpret", anykvm("interpret"), 300),
)}
