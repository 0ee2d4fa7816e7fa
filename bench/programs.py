"""The programs that `make bench` runs, in one folder that every contestant gets alike: cache/bench/tree.

Debian's own come by apt-get download, ours from bench/workloads are built with the host's gcc. All names are relative to the
folder, and programs with shared libraries are started through the tree's own loader: so nothing of the host's system is used
in the native run, which needs neither root nor chroot, and a guest needs nothing but the folder.

    bin/       programs             lib/   the loader and the libraries
    python/    Python's library     perl/  Perl's
    data/      what the programs read
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

BENCH = pathlib.Path(__file__).resolve().parent
ROOT = BENCH.parent
CACHE = ROOT / "cache/bench"
TREE = CACHE / "tree"
sys.path.insert(0, str(ROOT / "scripts/lib"))
import debian  # noqa: E402
from initramfs import Archive  # noqa: E402

PACKAGES = ["libc6", "openssl", "libssl3", "libssl-dev", "gzip", "xz-utils", "liblzma5", "dash", "python3.11-minimal",
            "libpython3.11-minimal", "libexpat1", "zlib1g", "perl-base", "libcrypt1", "sqlite3", "libsqlite3-0", "libreadline8",
            "libtinfo6", "cpp-12", "libisl23", "libmpc3", "libmpfr6", "libgmp10", "libzstd1", "libstb-dev"]
PROGRAMS = {"gzip": "bin/gzip", "xz": "usr/bin/xz", "dash": "bin/dash", "python": "usr/bin/python3.11", "perl": "usr/bin/perl",
            "sqlite3": "usr/bin/sqlite3", "cc1": "usr/lib/gcc/x86_64-linux-gnu/12/cc1"}
LOADER = "lib/ld-linux-x86-64.so.2"
CFLAGS = ["-O2", "-march=x86-64-v2", "-Wall", "-Wextra"]


def program(name):
    """The command line's beginning that starts a dynamic program of the tree."""
    return [LOADER, "--library-path", "lib", f"bin/{name}"]


def copy_programs(root, tree):
    for name, path in PROGRAMS.items():
        shutil.copy(root / path, tree / "bin" / name)
        for soname, file in debian.libraries_of(root, root / path).items():
            shutil.copy(file, tree / "lib" / soname)
    shutil.copy(debian.loader_of(root), tree / LOADER)
    shutil.copytree(root / "usr/lib/python3.11", tree / "python/lib/python3.11")
    shutil.copytree(root / "usr/lib/x86_64-linux-gnu/perl-base", tree / "perl")
    shutil.copy((root / "usr/lib/x86_64-linux-gnu/libcrypto.so.3").resolve(), tree / "lib/libcrypto.so.3")


def build_workloads(root, tree):
    for source in sorted((BENCH / "workloads").iterdir()):
        if source.suffix == ".c" and source.stem != "crypto":
            subprocess.run(["gcc", *CFLAGS, "-static", "-o", tree / "bin" / source.stem, source, "-lm"], check=True)
        elif source.suffix in (".py", ".pl"):
            shutil.copy(source, tree / "data" / source.name)
    include = [f"-I{root / 'usr/include'}", f"-I{root / 'usr/include/x86_64-linux-gnu'}"]
    subprocess.run(["gcc", *CFLAGS, *include, "-o", tree / "bin/crypto", BENCH / "workloads/crypto.c", tree / "lib/libcrypto.so.3"],
                   check=True)
    subprocess.run(["gcc", "-O2", "-static", "-o", tree / "runner", BENCH / "runner.c"], check=True)


def make_data(root, tree):
    """Text to compress and to count words in, a preprocessed C file, an RSA key."""
    modules = sorted((root / "usr/lib/python3.11").glob("*.py"))
    text = b"".join(module.read_bytes() for module in modules)
    (tree / "data/text").write_bytes(text[:4 << 20])
    for kib in (100, 256, 2048):
        (tree / f"data/text-{kib}k").write_bytes((text * 2)[:kib << 10])
    for name, macro in (("sprintf", "STB_SPRINTF_IMPLEMENTATION"), ("rect_pack", "STB_RECT_PACK_IMPLEMENTATION")):
        source = root / f"usr/include/stb/stb_{name}.h"
        subprocess.run(["gcc", "-E", "-P", "-x", "c", f"-D{macro}", "-o", tree / f"data/{name}.i", source], check=True)
    subprocess.run([*debian.command_of(root, root / "usr/bin/openssl"), "genrsa", "-out", tree / "data/rsa.pem", "2048"], check=True,
                   capture_output=True, env={"OPENSSL_CONF": "/dev/null", "PATH": os.environ["PATH"]})


def recipe():
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for path in sorted([BENCH / "runner.c", *(BENCH / "workloads").iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def make():
    """Makes the tree unless it is there as today's sources would make it."""
    stamp = CACHE / "recipe"
    if stamp.exists() and stamp.read_text() == recipe() and TREE.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="make-") as name:
        folder = pathlib.Path(name)
        os.chmod(folder, 0o755)  # apt's own download user writes here
        root, tree = folder / "root", folder / "tree"
        packages = CACHE / "packages"
        if sorted(file.name.split("_")[0] for file in packages.glob("*.deb")) != sorted(PACKAGES):
            print("bench: downloading the programs' Debian packages", file=sys.stderr, flush=True)
            (folder / "packages").mkdir(mode=0o755)
            debian.fetch(PACKAGES, folder / "packages", ROOT / "cache")
            shutil.rmtree(packages, ignore_errors=True)
            (folder / "packages").rename(packages)
        for deb in packages.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        for part in ("bin", "lib", "data"):
            (tree / part).mkdir(parents=True)
        copy_programs(root, tree)
        build_workloads(root, tree)
        make_data(root, tree)
        shutil.rmtree(TREE, ignore_errors=True)
        tree.rename(TREE)
        stamp.write_text(recipe())


def archive(lines):
    """What these lines of the runner's list need of the tree, as an initramfs archive, under /bench."""
    words = {word for line in lines for word in line.split("\t")}
    # A dynamic program may need any of the libraries and of the data; the others need themselves alone.
    everything = LOADER in words
    result = Archive()
    result.add_folder("bench")
    for path in sorted(TREE.rglob("*")):
        name = str(path.relative_to(TREE))
        if path.is_dir():
            result.add_folder(f"bench/{name}")
        elif everything or name in words or name == "runner":
            result.add_file(f"bench/{name}", path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
    return result.finish()
