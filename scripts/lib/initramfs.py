"""Writes initramfs archives (cpio "newc", Documentation/driver-api/early-userspace/buffer-format.rst).

Written here rather than by cpio(1): device nodes need no root this way, and the same input gives the same bytes. The
kernel unpacks concatenated archives one after the other, later files over earlier ones: that is how a task is added.
"""

import stat


class Archive:
    def __init__(self):
        self._bytes = bytearray()
        self._inode = 0

    def add_folder(self, path):
        self._entry(path, stat.S_IFDIR | 0o755)

    def add_file(self, path, content, mode):
        self._entry(path, stat.S_IFREG | mode, content)

    def add_link(self, path, target):
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def add_device(self, path, major, minor):
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self):
        self._entry("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _entry(self, path, mode, content=b"", device=(0, 0)):
        name = path.encode() + b"\0"
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, device[0], device[1], len(name), 0)
        self._bytes += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._pad()
        self._bytes += content
        self._pad()

    def _pad(self):
        self._bytes += bytes(-len(self._bytes) % 4)
