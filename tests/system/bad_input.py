#!/usr/bin/env python3
"""What `anykvm boot` answers to bad files, usage and guests: the exit status, and a line that names the cause."""

import pathlib
import struct
import sys
import tempfile
import unittest

import harness

OPTIONS = None
USAGE, BAD_INPUT, BROKEN_GUEST, TIMED_OUT = 64, 65, 70, 124


def pvh_kernel(code):
    """A whole ELF kernel around a few bytes of 32-bit code: one segment at 1 MiB, and the note with its PVH entry."""
    base, headers = 0x100000, 64 + 2 * 56
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", base)
    code_offset = headers + len(note)
    elf = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 7, code_offset, base, base, len(code), len(code), 4)
    elf += struct.pack("<IIQQQQQQ", 4, 4, headers, 0, 0, len(note), len(note), 4)
    return elf + note + code


# cli; lidt of six zero bytes at the end of the code; ud2: no handler, no double-fault handler, a triple fault.
TRIPLE_FAULT = bytes.fromhex("fa 0f 01 1d") + struct.pack("<I", 0x10000A) + bytes.fromhex("0f 0b") + bytes(6)
# cli; hlt; and again, should anything wake it.
SLEEP_FOREVER = bytes.fromhex("fa f4 eb fc")
# jmp to itself.
SPIN_FOREVER = bytes.fromhex("eb fe")


class BadInput(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.guest = harness.Guest("6.1")

    def file(self, name, content):
        path = pathlib.Path(self.folder.name) / name
        path.write_bytes(content)
        return str(path)

    def expect(self, status, arguments, *, says=""):
        result = harness.run([str(OPTIONS.anykvm), *arguments], deadline=120)
        self.assertEqual(result.status, status, f"{arguments}\n{result.messages}\n{result.console[-2000:]}")
        self.assertIn(says, result.messages)
        if status in (BAD_INPUT, BROKEN_GUEST, TIMED_OUT):
            lines = [line for line in result.messages.splitlines() if line.strip()]
            self.assertEqual(len(lines), 1, f"one line, not {lines}")
        return result

    def boot(self, kernel=None, initrd=None, *more):
        line = ["boot", "--quiet", "--engine", "interpret", "--timeout", "60"]
        line += ["--kernel", str(kernel or self.guest.vmlinuz)]
        return line + ["--initrd", str(initrd or self.guest.initrd), *more]

    def test_missing_files(self):
        for line in (self.boot("/no/such/kernel"), self.boot(None, "/no/such/initrd"),
                     self.boot(None, None, "--disk", "/no/such/disk")):
            self.expect(BAD_INPUT, line, says="/no/such/")

    def test_empty_files(self):
        empty = self.file("empty", b"")
        self.expect(BAD_INPUT, self.boot(empty), says=empty)
        self.expect(BAD_INPUT, self.boot(None, empty), says=empty)
        self.expect(BAD_INPUT, self.boot(None, None, "--disk", empty), says=empty)

    def test_truncated_bzimage(self):
        whole = self.guest.vmlinuz.read_bytes()
        for size in (1, 511, 512, 0x202, 0x250, 4096, 100_000, len(whole) // 2, len(whole) - 4096):
            self.expect(BAD_INPUT, self.boot(self.file("kernel", whole[:size])), says="kernel")

    def test_truncated_elf(self):
        whole = self.guest.vmlinux.read_bytes()
        for size in (4, 63, 100, 4096, len(whole) // 2):
            self.expect(BAD_INPUT, self.boot(self.file("kernel", whole[:size])), says="kernel")

    def test_foreign_kernel(self):
        program = pathlib.Path("/bin/sh").read_bytes()
        for content in (program, b"#!/bin/sh\nexit 0\n" * 500, bytes(65536), pathlib.Path(__file__).read_bytes()):
            self.expect(BAD_INPUT, self.boot(self.file("kernel", content)), says="kernel")
        self.expect(BAD_INPUT, self.boot(self.folder.name), says=self.folder.name)

    def test_foreign_and_truncated_initrd(self):
        for content in (b"hello\n" * 100, bytes(4096), self.guest.initrd.read_bytes()[:100_000]):
            self.expect(BAD_INPUT, self.boot(None, self.file("initrd", content)), says="initrd")
        self.expect(BAD_INPUT, self.boot(None, self.folder.name), says=self.folder.name)

    def test_initrd_larger_than_memory(self):
        large = self.file("initrd", self.guest.initrd.read_bytes() + bytes(80 << 20))
        self.expect(BAD_INPUT, self.boot(None, large, "--memory", "64M"))

    def test_bad_disks(self):
        ragged = self.file("ragged", bytes(1000))
        self.expect(BAD_INPUT, self.boot(None, None, "--disk", ragged), says=ragged)
        other_format = self.file("image.qcow2", b"QFI\xfb\0\0\0\3" + bytes(65536 - 8))
        self.expect(BAD_INPUT, self.boot(None, None, "--disk", other_format), says=other_format)
        self.expect(BAD_INPUT, self.boot(None, None, "--disk", self.folder.name), says=self.folder.name)

    def test_usage(self):
        kernel = ["--kernel", str(self.guest.vmlinuz)]
        for line in ([], ["boot"], ["fly"], ["boot", "--no-such-option"], ["boot", *kernel, "--cpus", "0"],
                     ["boot", *kernel, "--cpus", "many"], ["boot", *kernel, "--memory", "lots"],
                     ["boot", *kernel, "--memory", "0"], ["boot", *kernel, "--engine", "steam"],
                     ["boot", *kernel, "--net", "carrier-pigeon"], ["boot", *kernel, "--timeout", "soon"]):
            self.expect(USAGE, line)

    def test_triple_fault(self):
        self.expect(BROKEN_GUEST, self.boot(self.file("kernel", pvh_kernel(TRIPLE_FAULT))), says="triple fault")

    def test_time_out(self):
        for code in (SLEEP_FOREVER, SPIN_FOREVER):
            line = ["boot", "--quiet", "--engine", "interpret", "--kernel", self.file("kernel", pvh_kernel(code))]
            result = self.expect(TIMED_OUT, [*line, "--timeout", "1"])
            self.assertLess(result.seconds, 10)


if __name__ == "__main__":
    OPTIONS, rest = harness.arguments(__doc__).parse_known_args()
    harness.require_tool(OPTIONS.anykvm)
    unittest.main(argv=[sys.argv[0], *rest])
