"""Takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst: payload_offset, payload_length)."""

import gzip
import lzma
import struct
import subprocess


def _lz4(payload):
    return subprocess.run(["lz4", "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout


def _zstd(payload):
    return subprocess.run(["zstd", "-dc", "--long=31"], input=payload, stdout=subprocess.PIPE, check=True).stdout


FORMATS = [
    (b"\x1f\x8b", gzip.decompress),
    (b"\xfd7zXZ\0", lambda payload: lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)),
    (b"\x02\x21\x4c\x18", _lz4),
    (b"\x28\xb5\x2f\xfd", _zstd),
]


def extract_vmlinux(image):
    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The build appends the unpacked size (4 bytes) to the compressed stream.
    payload = image[start : start + length - 4]
    for magic, decompress in FORMATS:
        if payload.startswith(magic):
            kernel = decompress(payload)
            if not kernel.startswith(b"\x7fELF"):
                raise ValueError("the payload is no ELF file")
            return kernel
    raise ValueError("unknown compression of the payload")
