"""What the system tests share: starting `anykvm boot`, giving the guest a task, reading what it printed.

A task is a shell script that the guest's /init runs before it powers off; it rides in an archive of its own behind the
guest's initrd. It marks its output with "== name" lines, so that a test asks for a section and not for a line number.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts/lib"))
from initramfs import Archive  # noqa: E402

SKIPPED = 77  # what CTest is told to take for "skipped"

# A kernel that met something it could not explain says one of these.
KERNEL_COMPLAINTS = re.compile(
    r"\bBUG\b|\bWARNING\b|[Uu]nhandled|soft lockup|hard LOCKUP|rcu.*(stall|detected)|Call Trace|\bOops\b|"
    r"general protection|segfault|invalid opcode|hung_task|blocked for more than|nobody cared|Kernel panic|"
    r"unchecked MSR|clocksource.*unstable"
)
# Lines that real hardware shows as well: what the CPU model lacks or the distribution chose, no fault of the machine.
KNOWN_HARMLESS = re.compile(r"WARNING: Unprivileged eBPF|Spectre V2 : .*WARNING|Speculative Return Stack Overflow: WARNING")


class Guest:
    """A fetched guest: cache/guests/NAME."""

    def __init__(self, name):
        self.folder = ROOT / "cache/guests" / name
        if not (self.folder / "vmlinuz").exists():
            print(f"no guest {name}; scripts/fetch-guests {name} fetches it")
            sys.exit(SKIPPED)
        self.vmlinuz = self.folder / "vmlinuz"
        self.vmlinux = self.folder / "vmlinux"
        self.initrd = self.folder / "initrd"


def program_files(name):
    """What write_initrd() takes to have a fetched program in the guest: cache/programs/NAME."""
    folder = ROOT / "cache/programs" / name
    if not folder.exists():
        print(f"no program {name}; scripts/fetch-programs {name} fetches it")
        sys.exit(SKIPPED)
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


class Run:
    """What came of one `anykvm boot`."""

    def __init__(self, status, console, messages, seconds):
        self.status, self.console, self.messages, self.seconds = status, console, messages, seconds

    def section(self, name):
        found = re.search(rf"^== {re.escape(name)}\n(.*?)(?=^== |\Z)", self.console, re.MULTILINE | re.DOTALL)
        check(found, f"the guest printed no section '{name}'", self)
        return found.group(1)


def check(condition, what, run=None):
    if condition:
        return
    print(f"FAILED: {what}")
    if run is not None:
        print(f"--- exit status {run.status} after {run.seconds:.1f} s; messages:\n{run.messages}")
        task, _, log = run.console.partition("\n== dmesg\n")
        print("--- the console's last lines:\n" + "\n".join(task.splitlines()[-60:]))
        if log:
            print("--- the end of the guest's kernel log:\n" + "\n".join(log.splitlines()[-20:]))
    sys.exit(1)


def write_initrd(folder, guest, task, files=None):
    """The guest's initrd with `task` and programs ({name: path}) in it; answers its path."""
    archive = Archive()
    names = [pathlib.PurePath(name) for name in files or {}]
    for parent in sorted({str(parent) for name in names for parent in name.parents} - {"."}):
        archive.add_folder(parent)
    # The kernel's own messages stay in its log (dmesg) and out of the task's sections.
    archive.add_file("task", b"#!/bin/sh\ndmesg -n 1\n" + task.encode(), 0o755)
    for name, program in (files or {}).items():
        archive.add_file(name, program.read_bytes(), 0o755)
    path = pathlib.Path(folder) / "initrd"
    path.write_bytes(guest.initrd.read_bytes() + archive.finish())
    return path


def command(tool, *, kernel, initrd, append="", cpus=1, memory="512M", disks=(), net="none", engine="interpret",
            timeout=None):
    line = [str(tool), "boot", "--engine", engine, "--kernel", str(kernel), "--cpus", str(cpus), "--memory", memory]
    # panic=-1: a guest that panics ends at once instead of waiting for the time-out.
    line += ["--initrd", str(initrd), "--append", f"panic=-1 {append}".strip(), "--net", net]
    for disk in disks:
        line += ["--disk", str(disk)]
    if timeout is not None:
        line += ["--timeout", str(timeout)]
    return line


def start(line):
    """Starts a command for a test that watches it; its console is a binary pipe."""
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(line, deadline=900):
    begin = time.monotonic()
    try:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline)
    except subprocess.TimeoutExpired as expired:
        late = Run(None, text(expired.stdout), text(expired.stderr), time.monotonic() - begin)
        check(False, f"still running after {deadline} s: {' '.join(line)}", late)
    return Run(done.returncode, text(done.stdout), text(done.stderr), time.monotonic() - begin)


def text(output):
    return (output or b"").decode(errors="replace").replace("\r", "")


def boot(tool, guest, task, *, kernel=None, files=None, **options):
    """Boots the guest with a task and expects it to power off in good order."""
    options.setdefault("timeout", 600)
    with tempfile.TemporaryDirectory() as folder:
        initrd = write_initrd(folder, guest, task, files)
        line = command(tool, kernel=kernel or guest.vmlinuz, initrd=initrd, **options)
        result = run(line, max(900, options["timeout"] + 60))
    check(result.status == 0, "the guest did not power off in good order", result)
    return result


def check_kernel_log(result, provoked=None):
    """provoked: a pattern of what the test has made the kernel say on purpose."""
    log = result.section("dmesg")
    for line in (provoked.sub("", log) if provoked else log).splitlines():
        complains = KERNEL_COMPLAINTS.search(line) and not KNOWN_HARMLESS.search(line)
        check(not complains, f"the kernel complained: {line}", result)


def arguments(description):
    """The parser of a test script: every one takes the command to test."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anykvm", required=True, type=pathlib.Path, help="the anykvm command under test")
    return parser


def guest_arguments(description):
    """The parser of a test script that boots a fetched guest; for parse()."""
    parser = arguments(description)
    parser.add_argument("--guest", default="6.1")
    return parser


def parse(parser):
    """The options, and the guest; skips the test where either it or the tool is not there."""
    options = parser.parse_args()
    require_tool(options.anykvm)
    return options, Guest(options.guest)


def require_tool(tool):
    if not os.access(tool, os.X_OK):
        print(f"{tool} is not built")
        sys.exit(SKIPPED)
