"""Makes a raw disk that a PC's firmware boots GRUB from: no root, no loop devices, only grub-mkimage and GRUB's modules.

The layout is what grub-install makes of an MBR disk: boot.img in sector 0, the core image behind it, one partition from 1 MiB on.
The partition holds any file system that GRUB reads; a tar archive is one, too.
"""

import io
import pathlib
import struct
import subprocess
import tarfile
import tempfile

SECTOR = 512
PARTITION_START = 2048  # sectors
MODULES = ["biosdisk", "part_msdos", "linux", "serial", "terminal", "normal", "echo", "boot", "reboot", "halt"]
FORMAT = "i386-pc"


def core_image(mkimage, modules, config, file_system):
    with tempfile.TemporaryDirectory() as folder:
        script, core = pathlib.Path(folder) / "grub.cfg", pathlib.Path(folder) / "core.img"
        script.write_text(config)
        subprocess.run([mkimage, "-d", modules, "-O", FORMAT, "-o", core, "-p", "(hd0,msdos1)/", "-c", script, *MODULES,
                        file_system],
                       check=True, capture_output=True)
        return bytearray(core.read_bytes())


def boot_area(config, file_system, size, *, mkimage="grub-mkimage", modules=f"/usr/lib/grub/{FORMAT}"):
    """The bytes before the partition: GRUB, which runs the script `config`. The partition has `size` bytes, in whole sectors,
    and what GRUB's module `file_system` reads."""
    core = core_image(mkimage, modules, config, file_system)
    # The core's first sector loads the rest by a list that ends the sector: first sector, count, segment.
    struct.pack_into("<Q", core, SECTOR - 12, 2)
    assert len(core) < (PARTITION_START - 1) * SECTOR

    boot = bytearray((pathlib.Path(modules) / "boot.img").read_bytes())
    linux = 0x83
    boot[446:510] = bytes(64)  # what boots floppies is where a disk has its partitions
    struct.pack_into("<B3sB3sII", boot, 446, 0x80, bytes(3), linux, bytes(3), PARTITION_START, size // SECTOR)
    area = bytes(boot) + bytes(core)
    return area + bytes(PARTITION_START * SECTOR - len(area))


def make_disk(config, files, **tools):
    """The bytes of a disk whose GRUB runs the script `config`; `files` maps names to contents, found under (hd0,msdos1)/."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    data = archive.getvalue()
    data += bytes(-len(data) % SECTOR)
    return boot_area(config, "tar", len(data), **tools) + data
