#!/usr/bin/env python3
"""libguestfs as it is, its direct backend under `anykvm run`: it finds KVM by itself, and its own test passes."""

import os
import pathlib
import re
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "system"))
import harness  # noqa: E402
from harness import check  # noqa: E402

DEBIAN = harness.ROOT / "cache/debian"


def missing():
    """What keeps libguestfs from running here."""
    for program in ("libguestfs-test-tool", "qemu-system-x86_64"):
        if not shutil.which(program):
            return f"{program} is not there; scripts/setup libguestfs installs it"
    # supermin copies the folder itself into its appliance, also where the modules come from another one.
    if not pathlib.Path("/lib/modules").exists():
        return "/lib/modules is not there; scripts/setup libguestfs makes it"
    if not (DEBIAN / "modules").exists():
        return "no kernel with modules here; scripts/setup debian and scripts/fetch-debian make one"
    return None


def main():
    parser = harness.arguments(__doc__)
    parser.add_argument("--engine", default="direct")
    options = parser.parse_args()
    harness.require_tool(options.anykvm)
    if problem := missing():
        print(problem)
        sys.exit(harness.SKIPPED)
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace"
        os.environ |= {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_CACHEDIR": folder, "TMPDIR": folder,
                       "SUPERMIN_KERNEL": str(DEBIAN / "vmlinuz"), "SUPERMIN_MODULES": str(next((DEBIAN / "modules").iterdir()))}
        result = harness.run([str(options.anykvm), "run", "--engine", options.engine, "--trace", str(trace), "--",
                              "libguestfs-test-tool"], 500)
        exits = trace.read_text().count('"name":"guest"') if trace.exists() else 0
    # It reports on stderr.
    result.console = result.messages + result.console
    check(result.status == 0 and "===== TEST FINISHED OK =====" in result.console, "libguestfs's test failed", result)
    check("qemu KVM: enabled" in result.console, "libguestfs did not find KVM", result)
    check(re.search(r"-machine accel=kvm\b", result.console), "libguestfs did not ask for KVM", result)
    check("Switched to clocksource kvm-clock" in result.console, "the appliance did not run on KVM", result)
    check(exits > 1000, f"our trace has {exits} exits", result)
    print(f"libguestfs: {result.seconds:.1f} s")


if __name__ == "__main__":
    main()
