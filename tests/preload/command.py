#!/usr/bin/env python3
"""`anykvm run` from the outside: what the program gets (arguments, environment, KVM), and what a terminal is told."""

import argparse
import json
import os
import pathlib
import pty
import shutil
import signal
import subprocess
import sys
import tempfile

ARGUMENTS = ["", "--", "-x", "--engine", "[a,b]", "two words", "%%"]


def run(line, **options):
    return subprocess.run([str(part) for part in line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, **options)


def check(condition, what, seen=None):
    if not condition:
        sys.exit(f"FAILED: {what}: {seen}")


def on_terminal(line):
    """What the command writes to a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(line[0], [str(part) for part in line])
    text = b""
    try:
        while more := os.read(terminal, 4096):
            text += more
    except OSError:  # the other side is closed
        pass
    check(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "it fails on a terminal", text)
    return text.decode().splitlines()


def check_statistics(command, software, client):
    line = [*software, "--stats", "--", client, "linger"]
    program = subprocess.Popen([str(part) for part in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        check(program.stdout.readline() == "lingering\n", "the client does not come up")
        result = run([command, "top", "--interval", "0.3", "--count", "2", "--vcpus"])
        rows = [line.split() for line in result.stdout.splitlines()]
        titles = rows[0][rows[0].index("vCPUs"):]
        mine = [row[row.index("1"):] for row in rows if row[0] == str(program.pid)]
        check(len(mine) == 2, "`anykvm top` does not show the process in each table", result)
        rates = dict(zip(titles, mine[1]))
        check(int(rates["io"]) > 1000 and rates["mmio"] == "0", "`anykvm top` does not count", result)
        check(any(row[0] == "vcpu-0" for row in rows), "`anykvm top --vcpus` shows none", result)

        program.send_signal(signal.SIGUSR2)
        first = program.stderr.readline()
        check(f"kvm-{program.pid}, 1 vCPUs, interpret" in first, "SIGUSR2 prints no statistics", first)
        program.terminate()
        rest = program.stderr.read()
        program.wait(60)
    finally:
        program.kill()
    check(program.returncode == 0, "the client does not end in good order", rest)
    check(rest.count(f"kvm-{program.pid}") == 1 and rest.count("  io_exits ") == 2, "no statistics at the end", rest)
    check("mmio" not in rest, "statistics of what did not happen", rest)

    result = run([*software, "--stats", "--", client, "own_usr2"])
    check(result.returncode == 0 and "halt_exits" not in result.stdout, "SIGUSR2 of the client's own", result)
    check(run([*software, "--stats", "--", client, "fork"]).stderr.count("anykvm: kvm-") == 2, "a forked child's statistics")


def check_trace(software, client, folder):
    path = folder / "trace"
    # Two processes write the same file.
    program = ["sh", "-c", f"{client} run && {client} threads"]
    result = run([*software, "--trace", path, "--", *program])
    check(result.returncode == 0 and not result.stderr, "a traced client", result)
    events = json.loads(path.read_text() + "]")[1:]
    stays = [event for event in events if event["ph"] == "X"]
    outs = [event for event in stays if event["args"].get("OUT") == "0x10"]
    check(len(outs) == 1 and outs[0]["name"] == "guest" and outs[0]["dur"] > 0, "the guest's OUT is not in the trace", outs)
    check(sum("HLT" in event["args"] for event in stays) == 9, "halts are missing", len(events))
    check(sum(event["args"].get("IN") == "0x20" for event in stays) == 8000, "exits are missing", len(events))
    check(len({event["pid"] for event in events}) == 2, "not both processes are in the trace")
    check(any(event["name"] == "real mode" for event in events), "no mode in the trace")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anykvm", required=True, type=pathlib.Path)
    parser.add_argument("--client", required=True, type=pathlib.Path, help="preload_client")
    options = parser.parse_args()
    anykvm = [options.anykvm.resolve(), "run"]
    client = options.client.resolve()
    for name in ("LD_PRELOAD", "ANYKVM_ENGINE", "ANYKVM_QUIET"):
        os.environ.pop(name, None)

    result = run([*anykvm, "--engine", "interpret", "--", client, "run"])
    check((result.returncode, result.stdout, result.stderr) == (0, "", ""), "a client", result)
    check(run([*anykvm, client, "run"]).returncode == 0, "a client without '--'")
    check(run([*anykvm, "--", "sh", "-c", f"env true && {client} run && exit 3"]).returncode == 3, "a client's launcher")
    check(run([*anykvm, "--", *anykvm, "--", client, "run"]).returncode == 0, "a run inside a run")
    check(run([*anykvm, "--engine", "host", "--", "sh", "-c", "echo $LD_PRELOAD"]).stdout == "\n", "--engine host preloads")

    show = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    for line in ([*anykvm, "--", *show, *ARGUMENTS], [*anykvm, *show, *ARGUMENTS]):
        result = run(line)
        check(result.stdout == f"{ARGUMENTS}\n", "arguments change on their way", result)

    show = ["sh", "-c", "echo $ANYKVM_ENGINE $LD_PRELOAD"]
    other = "libm.so.6"
    result = run([*anykvm, "--engine", "interpret", "--", *show], env={**os.environ, "LD_PRELOAD": other})
    engine, _, preloads = result.stdout.strip().partition(" ")
    library, _, rest = preloads.partition(":")
    check(engine == "interpret" and library.endswith("/libanykvm-preload.so") and rest == other, "the environment", result)
    again = run([*anykvm, "--", *show], env={**os.environ, "LD_PRELOAD": preloads, "ANYKVM_ENGINE": "interpret"})
    check(again.stdout == result.stdout, "the environment of a second run", again)

    result = run([*anykvm, "--", "sh", "-c", "kill -TERM $$"])
    check(result.returncode == -signal.SIGTERM, "a signal that ends the program", result)

    with tempfile.TemporaryDirectory() as folder:
        headless = pathlib.Path(folder) / "headless"
        headless.write_text(f"{client} run && exit 4\n")
        headless.chmod(0o755)
        check(run([*anykvm, "--", headless]).returncode == 4, "a script without a first line")
        away = pathlib.Path(folder) / "bin/anykvm"
        away.parent.mkdir()
        shutil.copy(options.anykvm, away)
        check_trace([*anykvm, "--engine", "interpret"], client, pathlib.Path(folder))
        result = run([away, "run", "--", "true"])
        check(result.returncode == 69 and "libanykvm-preload.so" in result.stderr, "a command without its library", result)

    software = [*anykvm, "--engine", "interpret"]
    check_statistics(options.anykvm.resolve(), software, client)
    told = on_terminal([*software, "--", "sh", "-c", f"{client} run; {client} run"])
    check(len(told) == 1 and "software engine interpret" in told[0], "a terminal is told once", told)
    told = on_terminal([*software, "--quiet", "--", client, "run"])
    check(not told, "--quiet says something", told)


if __name__ == "__main__":
    main()
