#!/usr/bin/env python3
"""stress-ng in a guest with more CPUs than the host has: mixes of its stressors, all at once, each of which checks its results.

A stressor that fails, dies or hangs fails the test; so does a kernel that complains.
"""

import re

import harness
from harness import check

# Only those that check their results, and need nothing that the guest has not. "processes" has none that execute programs:
# they refuse to do that as root (stress.py's "forks" does it). As root, madvise declares memory broken, and dies of it;
# vm-segv calls it a failure when it was given no time; mmapfork takes all memory, and time.
MIXES = {
    "memory": """memcpy mcontend memthrash malloc stack stackmmap tlb-shootdown atomic misaligned prefetch str tree vm
                 vm-addr""",
    "compute": """cpu crypt hash matrix fp vecmath vecfp vecshuf vecwide bsearch qsort longjmp funccall funcret regs rotate
                  goto icache far-branch jpeg judy zlib""",
    "mappings": """mmap mmapmany mremap mprotect munmap mincore remap mlock fault userfaultfd vm-splice pagemove brk
                   msync""",
    "processes": "fork vfork clone daemon zombie wait exit-group pthread ptrace",
    "signals": """signal sigabrt sigchld sigfd sigfpe sigio signest sigpending sigpipe sigq sigrt sigsegv sigsuspend sigtrap
                  kill itimer timer fp-error""",
    "switches": """switch context pipe yield futex mutex sem sem-sysv msg fifo poll epoll eventfd membarrier sockpair""",
}
MIXES = {name: stressors.split() for name, stressors in MIXES.items()}

# In a long run, mappings need more memory than there is, and those of them die that may.
OUT_OF_MEMORY = re.compile(r"^[^\n]* invoked oom-killer: .*? Out of memory: Killed process \d+ \(stress-ng[^\n]*$",
                           re.MULTILINE | re.DOTALL)


def check_mix(name, result):
    said = result.section(name)
    check("skipped" not in said, f"{name}: some were skipped", result)
    check(said.splitlines()[-1] == "status 0" and "stress-ng: fail" not in said, f"{name}: a failure:\n{said}", result)
    # Name, operations, seconds: a short run on a busy host may be over before the last has begun, which has no such line.
    did = dict(re.findall(r"^stress-ng: metrc: \[\d+\] (\S+) +(\d+) +[\d.]+ +[\d.]+ +[\d.]+ ", said, re.MULTILINE))
    check(len(did) >= len(MIXES[name]) / 2, f"{name}: only these did something: {did.keys()}:\n{said}", result)
    operations = sum(map(int, did.values()))
    check(operations > len(MIXES[name]), f"{name}: {operations} operations", result)
    return operations


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("mixes", nargs="*", metavar="MIX", help=f"one after the other, of {', '.join(MIXES)}; all by default")
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--engine", default="translate")
    parser.add_argument("--seconds", type=int, default=6, help="that each mix runs")
    options, guest = harness.parse(parser)
    if unknown := set(options.mixes) - set(MIXES):
        parser.error(f"no such mix: {', '.join(unknown)}")
    files = harness.program_files("stress-ng")

    mixes = options.mixes or list(MIXES)
    # Stressors fault on purpose.
    task = "export PATH=$PATH:/usr/bin\ncd /tmp\necho 0 > /proc/sys/debug/exception-trace\n"
    for mix in mixes:
        stressors = " ".join(f"--{name} 1" for name in MIXES[mix])
        common = f"--verify --metrics-brief --no-rand-seed --oomable --timeout {options.seconds} --vm-bytes 32M"
        task += f"echo '== {mix}'\nstress-ng {common} {stressors} 2>&1\necho status $?\n"
    task += 'echo "== dmesg"\ndmesg\necho "== end"\n'
    result = harness.boot(options.anykvm, guest, task, files=files, cpus=options.cpus, engine=options.engine, memory="1536M",
                          timeout=300 + 4 * options.seconds * len(mixes))
    result.section("end")
    operations = {mix: check_mix(mix, result) for mix in mixes}
    harness.check_kernel_log(result, OUT_OF_MEMORY)
    print(f"stress-ng, {options.seconds} s each on {options.guest}, {options.cpus} CPUs: {result.seconds:.1f} s, {operations}")


if __name__ == "__main__":
    main()
