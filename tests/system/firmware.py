#!/usr/bin/env python3
"""PC firmware on our machine: SeaBIOS reaches its prompt and its menu on the serial port, boots a disk that uses its
services, starts again after a reset; a file that is no firmware is refused.
"""

import pathlib
import subprocess
import sys
import tempfile
import unittest

import harness

OPTIONS = None
IMAGES = pathlib.Path("/usr/share/seabios")  # Debian's package seabios
BAD_INPUT, TERMINATED = 65, 128 + 15
SECTOR = 512

# Reads sector 1 by cylinder and head, sector 2 by its number; counts its boots in sector 1, prints both texts by the video
# service, and resets the machine the first time, powers it off the second time.
BOOT_SECTOR = """
31 c0           00  xor ax, ax
8e d8           02  mov ds, ax
8e c0           04  mov es, ax
fa              06  cli
8e d0           07  mov ss, ax
bc 00 7c        09  mov sp, 0x7c00
fb              0c  sti
b8 01 02        0d  mov ax, 0x0201       read one sector
b9 02 00        10  mov cx, 2            of cylinder 0: number 2 from 1
b6 00           13  mov dh, 0            of head 0
bb 00 80        15  mov bx, 0x8000
cd 13           18  int 0x13
72 35           1a  jc sleep
be 6c 7c        1c  mov si, 0x7c6c       the packet
b4 42           1f  mov ah, 0x42         extended read
cd 13           21  int 0x13
72 2c           23  jc sleep
fe 06 00 80     25  inc byte [0x8000]
b8 01 03        29  mov ax, 0x0301       write
b9 02 00        2c  mov cx, 2
b6 00           2f  mov dh, 0
bb 00 80        31  mov bx, 0x8000
cd 13           34  int 0x13
72 19           36  jc sleep
be 00 80        38  mov si, 0x8000
e8 1f 00        3b  call print
be 00 82        3e  mov si, 0x8200
e8 19 00        41  call print
80 3e 00 80 31  44  cmp byte [0x8000], '1'
77 09           49  ja off
ba f9 0c        4b  mov dx, 0xcf9        reset control
b0 06           4e  mov al, 6
ee              50  out dx, al
f4              51  sleep: hlt
eb fd           52  jmp sleep
ba 04 06        54  off: mov dx, 0x604   PM1 control
b8 00 34        57  mov ax, 0x3400       S5
ef              5a  out dx, ax
eb f4           5b  jmp sleep
ac              5d  print: lodsb
84 c0           5e  test al, al
74 09           60  jz return
b4 0e           62  mov ah, 0x0e
bb 07 00        64  mov bx, 7
cd 10           67  int 0x10
eb f2           69  jmp print
c3              6b  return: ret
10 00 01 00     6c  packet: its size, one sector
00 82 00 00     70  to 0000:8200
02 00 00 00     74  LBA 2
00 00 00 00     78
"""


def boot_disk():
    code = b"".join(bytes.fromhex(line[:15]) for line in BOOT_SECTOR.strip().splitlines())
    sectors = code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    sectors += b"0. boot\r\n\0".ljust(SECTOR, b"\0")
    # SeaBIOS keeps the last character until the next one comes.
    sectors += b"sector two!\0".ljust(SECTOR, b"\0")
    return sectors + bytes(1 << 20)


class Session:
    """A running `anykvm boot` whose console a test reads and types on."""

    def __init__(self, *arguments):
        line = [str(OPTIONS.anykvm), "boot", "--engine", OPTIONS.engine, "--timeout", "120", *arguments]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.seen = b""

    def wait_for(self, text):
        while text.encode() not in self.seen:
            more = self.process.stdout.read1(4096)
            if not more:
                raise AssertionError(f"ended without '{text}':\n{harness.text(self.seen)}")
            self.seen += more

    def type(self, keys):
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def end(self, terminate=False):
        if terminate:
            self.process.terminate()
        self.seen += self.process.communicate()[0]
        return self.process.returncode

    def close(self):
        with self.process:
            self.process.kill()


class Firmware(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def file(self, name, content):
        path = pathlib.Path(self.folder.name) / name
        path.write_bytes(content)
        return str(path)

    def start(self, *arguments, image="bios.bin"):
        session = Session("--firmware", str(IMAGES / image), *arguments)
        self.addCleanup(session.close)
        return session

    def test_prompt_without_a_disk(self):
        log = pathlib.Path(self.folder.name) / "log"
        session = self.start("--firmware-log", str(log), "--cpus", "3")
        session.wait_for("SeaBIOS (version")
        session.wait_for("No bootable device.")
        self.assertEqual(session.end(terminate=True), TERMINATED)
        messages = log.read_text()
        self.assertIn("Running on QEMU (i440fx)", messages)
        self.assertIn("Found 3 cpu(s)", messages)
        self.assertNotIn("internal error", messages)

    def test_menu(self):
        session = self.start("--boot-menu", "--disk", self.file("disk", boot_disk()))
        session.wait_for("Press ESC for boot menu.")
        session.type(b"\x1b")
        session.wait_for("1. Virtio disk PCI:00:02.0")
        session.type(b"1")
        session.wait_for("sector two")
        session.end(terminate=True)

    def test_disk_boots_again_after_reset(self):
        for image in ("bios.bin", "bios-256k.bin"):
            disk = self.file("disk", boot_disk())
            session = self.start("--disk", disk, image=image)
            self.assertEqual(session.end(), 0, harness.text(session.seen))
            console = harness.text(session.seen)
            first, second = console.find("1. boot\nsector two"), console.find("2. boot\nsector two")
            self.assertTrue(0 <= first < second, console)
            self.assertEqual(pathlib.Path(disk).read_bytes()[SECTOR : SECTOR + 1], b"2", "the counter is on the disk")

    def test_other_files_are_refused(self):
        whole = (IMAGES / "bios.bin").read_bytes()
        for path, says in ((f"{self.folder.name}/missing", "cannot open"), (self.file("empty", b""), "is empty"),
                           (self.file("cut", whole[:-4096]), "cut off"),
                           (self.file("half", bytes(len(whole))), "no code at its reset vector"),
                           (self.folder.name, "directory")):
            result = harness.run([str(OPTIONS.anykvm), "boot", "--engine", "interpret", "--firmware", path], deadline=60)
            self.assertEqual(result.status, BAD_INPUT, result.messages)
            self.assertIn(says, result.messages)
            self.assertEqual(len(result.messages.splitlines()), 1, result.messages)


if __name__ == "__main__":
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="interpret")
    OPTIONS, rest = parser.parse_known_args()
    harness.require_tool(OPTIONS.anykvm)
    if not (IMAGES / "bios.bin").exists():
        print(f"no firmware in {IMAGES}; scripts/setup test installs it (package seabios)")
        sys.exit(harness.SKIPPED)
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
