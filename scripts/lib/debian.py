"""Debian packages by name, without root: downloaded through apt, which checks them against the signed archive index."""

import subprocess


class Error(Exception):
    pass


def indexes(cache):
    """apt options for the system's package index, then for one of our own under cache/: the system's may be missing or
    stale, and we may not be root to refresh it."""
    yield []
    state = cache / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User="]
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


def field(deb, name):
    """A field of a package's description, such as "Version"."""
    return subprocess.run(["dpkg-deb", "-f", deb, name], check=True, capture_output=True, text=True).stdout.strip()


def _run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
