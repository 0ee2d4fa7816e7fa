#!/usr/bin/env python3
"""Programs in the guest whose code is made while they run: LuaJIT compiles, aims jumps in finished code at what comes later,
drops all of it and compiles again, in as many processes as there are CPUs and some more. Each must print what it prints natively.
"""

import pathlib
import subprocess

import harness
from harness import check

SCRIPT = pathlib.Path(__file__).with_suffix(".lua")


def natively(files, seed, rounds):
    loader = files["lib64/ld-linux-x86-64.so.2"]
    libraries = files["lib/x86_64-linux-gnu/libc.so.6"].parent
    command = [loader, "--library-path", libraries, files["usr/bin/luajit"], SCRIPT, str(seed), str(rounds)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--engine", default="translate")
    parser.add_argument("--rounds", type=int, default=60, help="how much each process does")
    parser.add_argument("--timeout", type=int, default=600, help="in seconds: later it hangs")
    options, guest = harness.parse(parser)
    files = harness.program_files("luajit")

    seeds = range(1, options.cpus + (2 if options.cpus == 1 else 3))
    task = f"export PATH=$PATH:/usr/bin\nfor seed in {' '.join(map(str, seeds))}; do\n"
    task += f"  luajit jit.lua $seed {options.rounds} > /tmp/$seed.out 2> /tmp/$seed.err || echo \"status $?\" >> /tmp/$seed.err &\n"
    task += "done\nwait\n"
    task += "".join(f"echo '== out {seed}'\ncat /tmp/{seed}.out\necho '== err {seed}'\ncat /tmp/{seed}.err\n" for seed in seeds)
    task += 'echo "== dmesg"\ndmesg\necho "== end"\n'
    result = harness.boot(options.anykvm, guest, task, files={**files, "jit.lua": SCRIPT}, cpus=options.cpus, engine=options.engine,
                          timeout=options.timeout)
    result.section("end")
    counts = []
    for seed in seeds:
        out, err = result.section(f"out {seed}"), result.section(f"err {seed}").split()
        check(out == natively(files, seed, options.rounds), f"process {seed} printed something else than natively", result)
        check(len(err) == 4 and err[::2] == ["compiled", "dropped"], f"process {seed} said {err}", result)
        counts.append((int(err[1]), int(err[3])))
    check(all(compiled > 10 * options.rounds and dropped > options.rounds // 8 for compiled, dropped in counts),
          f"too little was compiled and dropped: {counts}", result)
    harness.check_kernel_log(result)
    print(f"jit, {options.rounds} rounds on {options.guest}, {options.cpus} CPUs: {result.seconds:.1f} s, compiled, dropped {counts}")


if __name__ == "__main__":
    main()
