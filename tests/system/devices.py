#!/usr/bin/env python3
"""The guest's devices: disks are read and written, a file comes over the user network, the entropy device answers."""

import functools
import hashlib
import http.server
import pathlib
import random
import tempfile
import threading

import harness
from harness import check

MIB = 1 << 20

TASK = """
echo "== disk content"
md5sum < /dev/vda
echo "== disk write"
dd if=/dev/vda of=/tmp/first bs=1M count=1 2>/dev/null
dd if=/tmp/first of=/dev/vda bs=1M seek=5 conv=notrunc,fsync 2>/dev/null && echo done
echo "== read-only disk"
cat /sys/block/vdb/ro
md5sum < /dev/vdb
dd if=/tmp/first of=/dev/vdb bs=4096 count=1 conv=notrunc,fsync 2>/dev/null && echo "was written"
echo "== file system"
mke2fs -F /dev/vdc > /dev/null && mount -t ext4 /dev/vdc /mnt && cp /tmp/first /bin/busybox /mnt && umount /mnt
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vdc /mnt && cmp /mnt/first /tmp/first && cmp /mnt/busybox /bin/busybox && echo same
umount /mnt
echo "== dhcp"
ip addr flush dev eth0
udhcpc -i eth0 -q -n -s /etc/dhcp 2>&1
echo "== fetched"
wget -q -O - http://10.0.2.2:PORT/payload | md5sum
echo "== refused"
wget -q -O - http://10.0.2.2:PORT/absent 2>&1
echo "== entropy"
cat /sys/class/misc/hw_random/rng_current
dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum
dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum
echo "== dmesg"
dmesg
echo "== end"
"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *unused):
        pass


def serve(folder):
    """An HTTP server on the host's loopback; the guest reaches it as 10.0.2.2."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def md5(content):
    return hashlib.md5(content).hexdigest()


def main():
    options = harness.arguments(__doc__).parse_args()
    harness.require_tool(options.anykvm)
    guest = harness.Guest("6.1")
    noise = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        content, fixed, payload = (noise.randbytes(size) for size in (8 * MIB, 1 * MIB + 512, 3 * MIB + 123))
        (folder / "disk").write_bytes(content)
        (folder / "fixed").write_bytes(fixed)
        (folder / "scratch").write_bytes(bytes(16 * MIB))
        (folder / "www").mkdir()
        (folder / "www/payload").write_bytes(payload)
        server = serve(folder / "www")
        task = TASK.replace("PORT", str(server.server_address[1]))
        disks = [folder / "disk", f"{folder}/fixed,ro", folder / "scratch"]
        result = harness.boot(options.anykvm, guest, task, cpus=2, net="user", disks=disks)
        server.shutdown()

        check(md5(content) in result.section("disk content"), "the guest read other bytes than the image holds", result)
        check("done" in result.section("disk write"), "the guest could not write its disk", result)
        expected = content[: 5 * MIB] + content[:MIB] + content[6 * MIB :]
        check((folder / "disk").read_bytes() == expected, "the image does not hold what the guest wrote", result)
        read_only = result.section("read-only disk").splitlines()
        check(read_only[:1] == ["1"], f"a disk given as ro is not read-only in the guest: {read_only}", result)
        check(md5(fixed) in read_only[1], "the guest read other bytes than the read-only image holds", result)
        check("was written" not in read_only, "the guest's write to a read-only disk succeeded", result)
        check((folder / "fixed").read_bytes() == fixed, "a read-only image has changed", result)
        check(result.section("file system").strip() == "same", "a file system on a disk lost files", result)

    check("dhcp: 10.0.2.15 via 10.0.2.2" in result.section("dhcp"), "no DHCP lease from the user network", result)
    check(md5(payload) in result.section("fetched"), "the fetched file differs from what the host serves", result)
    check("404" in result.section("refused"), "the server's refusal did not reach the guest", result)
    current, first, second = result.section("entropy").splitlines()[:3]
    check(current.startswith("virtio_rng"), f"the guest's entropy source is {current}", result)
    check(first != second, "the entropy device repeats itself", result)
    check(md5(b"") not in first + second, "the entropy device gave nothing", result)
    result.section("end")
    print(f"devices: {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
