#!/usr/bin/env python3
"""Linux with more CPUs than the host has, while its code is rewritten and its memory runs short.

Each part loads every CPU with pipelines whose result is known and does what has broken translators before; nothing may
be lost, go wrong, hang or be complained of in the kernel's log.

    ftrace    the function tracer is switched on and off: every function of the kernel is patched each time
    patching  static keys and kprobes come and go
    modules   modules are unloaded and loaded, at other addresses of what was other code before
    forks     storms of programs that live for a moment
    reclaim   files are written, dropped and read again in too little memory
"""

import hashlib

import harness
from harness import check

# What each CPU does meanwhile. A worker writes a line for each wrong result, and one with the number of right ones.
WORKERS = """
mkdir -p /tmp/counts
seq 1 5000 > /tmp/numbers
worker() {
  right=0
  while [ ! -e /tmp/stop ]; do
    sum=$(gzip -1 < /tmp/numbers | gzip -d | sort -rn | sort -n | sha256sum)
    if [ "$sum" = "EXPECTED  -" ]; then right=$((right + 1)); else echo "wrong: $sum"; fi
    usleep PAUSE
  done
  echo "right $right" > /tmp/counts/$1
}
begin() {
  cpu=0
  while [ $cpu -lt $(nproc) ]; do worker $cpu & cpu=$((cpu + 1)); done
  renice -n -20 $$ || fail "to come before the load"
}
end() {
  touch /tmp/stop
  wait
  echo "== workers"
  cat /tmp/counts/*
}
fail() { echo "failed: $*"; }
"""

PARTS = {
    "ftrace": """
mount -t tracefs tracefs /sys/kernel/tracing
cd /sys/kernel/tracing
grep -qw function available_tracers || { echo "== missing"; cat available_tracers; }
begin
i=0
while [ $i -lt ROUNDS ]; do
  echo function > current_tracer || fail "to switch the tracer on"
  usleep 20000
  echo nop > current_tracer || fail "to switch the tracer off"
  i=$((i + 1))
done
echo "entries of the last trace: $(grep entries-in-buffer trace)"
end
""",
    "patching": """
mount -t tracefs tracefs /sys/kernel/tracing
cd /sys/kernel/tracing
begin
i=0
while [ $i -lt ROUNDS ]; do
  echo 1 > /proc/sys/kernel/sched_schedstats || fail "to switch a static key on"
  echo 'p:one vfs_read' > kprobe_events || fail "to place a kprobe"
  echo 'r:two ksys_write' >> kprobe_events || fail "to place a kretprobe"
  echo 1 > events/kprobes/enable || fail "to enable the probes"
  usleep 20000
  echo 0 > events/kprobes/enable || fail "to disable the probes"
  echo > kprobe_events || fail "to take the probes away"
  echo 0 > /proc/sys/kernel/sched_schedstats
  i=$((i + 1))
done
end
""",
    "modules": """
begin
i=0
while [ $i -lt ROUNDS ]; do
  for module in virtio_blk virtio-rng; do
    rmmod $module || fail "to unload $module"
  done
  for module in virtio-rng virtio_blk; do
    insmod /lib/modules/$module.ko || fail "to load $module"
  done
  i=$((i + 1))
done
end
""",
    "forks": """
begin
storm() {
  i=0
  while [ $i -lt ROUNDS ]; do
    answer=$(sh -c 'echo $((6 * 7))' | cat)
    [ "$answer" = 42 ] || fail "6 * 7 is $answer"
    (: | : | :) &
    i=$((i + 1))
    [ $((i % 50)) -ne 0 ] || wait $!
  done
}
storm & first=$!
storm & second=$!
wait $first $second
end
""",
    "reclaim": """
begin
i=0
while [ $i -lt ROUNDS ]; do
  for file in 1 2 3; do cat /bin/busybox /tmp/numbers /bin/busybox > /tmp/file$file || fail "to write"; done
  echo 3 > /proc/sys/vm/drop_caches
  dd if=/dev/zero of=/dev/null bs=24M count=1 2> /dev/null || fail "to have 24 MiB"
  sums=$(sha256sum < /tmp/file1; sha256sum < /tmp/file2; sha256sum < /tmp/file3)
  [ $(echo "$sums" | sort -u | wc -l) -eq 1 ] || fail "to read what was written"
  echo 1 > /proc/sys/vm/compact_memory
  rm /tmp/file*
  i=$((i + 1))
done
end
""",
}
ROUNDS = {"ftrace": 2, "patching": 5, "modules": 4, "forks": 30, "reclaim": 3}
MEMORY = {"reclaim": "112M"}


def main():
    parser = harness.guest_arguments(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--pause", type=int, default=0, help="microseconds that the load rests between two results")
    parser.add_argument("--engine", default="translate")
    parser.add_argument("--rounds", type=int, help="how often")
    parser.add_argument("--timeout", type=int, default=600, help="in seconds: later it hangs")
    options, guest = harness.parse(parser)

    numbers = "".join(f"{n}\n" for n in range(1, 5001)).encode()
    rounds = options.rounds or ROUNDS[options.part]
    task = WORKERS.replace("EXPECTED", hashlib.sha256(numbers).hexdigest()).replace("PAUSE", str(options.pause))
    task += 'echo "== part"\n' + PARTS[options.part].replace("ROUNDS", str(rounds))
    task += 'echo "== dmesg"\ndmesg\necho "== end"\n'
    result = harness.boot(options.anykvm, guest, task, cpus=options.cpus, engine=options.engine, timeout=options.timeout,
                          memory=MEMORY.get(options.part, "512M"))
    result.section("end")
    check("== missing" not in result.console, "this kernel has no function tracer", result)
    part = result.section("part")
    check("failed:" not in part and "wrong:" not in part, "something failed", result)
    right = [int(line.split()[1]) for line in result.section("workers").splitlines() if line.startswith("right ")]
    check(len(right) == options.cpus and all(right), f"results of the workers: {right}", result)
    harness.check_kernel_log(result)
    print(f"{options.part}, {rounds} rounds on {options.guest}, {options.cpus} CPUs: {result.seconds:.1f} s, results {right}")


if __name__ == "__main__":
    main()
