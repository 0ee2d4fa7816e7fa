"""Which modules of a kernel package to load for a name, in which order: from each module's own .modinfo section."""

import lzma
import pathlib
import re


def read_module(path):
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _depends(content):
    # .modinfo is a run of NUL-terminated key=value strings; "depends=" appears once, and nowhere else in a module.
    found = re.search(rb"\0depends=([^\0]*)\0", content)
    return [name for name in found.group(1).decode().split(",") if name] if found else []


def load_order(root, names):
    """Paths of the modules under `root` that `names` need, each after those it depends on; built-in ones are left out."""
    by_name = {}
    for path in pathlib.Path(root).rglob("*.ko*"):
        by_name[path.name.split(".")[0].replace("-", "_")] = path
    order = []

    def visit(name):
        path = by_name.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        for dependency in _depends(read_module(path)):
            visit(dependency)
        order.append(path)

    for name in names:
        visit(name)
    return order
