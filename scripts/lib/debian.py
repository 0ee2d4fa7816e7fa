"""Debian packages by name, without root: downloaded through apt, which checks them against the signed archive index."""

import pathlib
import subprocess


class Error(Exception):
    pass


def indexes(cache, architecture=None):
    """apt options for the system's package index, then for one of our own under cache/: the system's may be missing or
    stale, and we may not be root to refresh it. It does not know another architecture's packages at all."""
    if not architecture:
        yield []
    state = cache / (f"apt-{architecture}" if architecture else "apt")
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User="]
    if architecture:
        own += ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures::={architecture}",
                "-o", "Dir::State::status=/dev/null"]
    _run(["apt-get", *own, "-q", "update"])
    yield own


def dependency(package, prefix, index):
    """The package with this prefix that a meta package depends on; None when the index does not know it."""
    for line in _run(["apt-cache", *index, "depends", "--important", package]).stdout.splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends" and name.startswith(prefix):
            return name
    return None


def download(packages, folder, index):
    """Downloads them into folder; answers their files, in order."""
    answer = _run(["apt-get", *index, "-q", "download", *packages], cwd=folder)
    if answer.returncode != 0:
        raise Error(f"cannot download {' and '.join(packages)}:\n{answer.stdout.rstrip()}")
    return [next(folder.glob(f"{package}_*.deb")) for package in packages]


def fetch(packages, folder, cache):
    """Downloads them into folder, by the first package index that has them all."""
    problem = None
    for index in indexes(cache):
        try:
            return download(packages, folder, index)
        except Error as error:
            problem = error
    raise problem


def libraries_of(root, binary):
    """Path of each shared library that a program or library of the unpacked packages in `root` needs, by its soname."""
    loader, *rest = command_of(root, binary)
    listed = subprocess.run([loader, "--list", *rest], check=True, capture_output=True, text=True).stdout
    found = {line.split()[0]: pathlib.Path(line.split()[2]).resolve() for line in listed.splitlines() if " => " in line}
    return {name: file for name, file in found.items() if "ld-linux" not in name}


def command_of(root, binary):
    """The command line's beginning that starts a program with the loader and the libraries of `root`."""
    path = ":".join(str(root / folder) for folder in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    return [loader_of(root), "--library-path", path, binary]


def loader_of(root):
    return (root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").resolve()


def field(deb, name):
    """A field of a package's description, such as "Version"."""
    return subprocess.run(["dpkg-deb", "-f", deb, name], check=True, capture_output=True, text=True).stdout.strip()


def _run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
