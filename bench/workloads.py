"""The workloads: what each runs, how often, and in which mean its figure counts. See bench/programs.py for the files."""

import dataclasses
import math

from programs import program

SQL = ("create table t(a integer primary key, b text, c integer); create index i on t(c); with recursive n(x) as (select 1 union "
       "all select x + 1 from n where x < {}) insert into t select x, hex(x * 7919), (x * 2654435761) % 10007 from n; select "
       "count(*), sum(length(b)), max(c) from t; select c, count(*) from t group by c order by 2 desc, 1 limit 3; select sum(u.a) "
       "from t join t u on u.c = t.c where t.a < 2000; delete from t where c % 3 = 0; select count(*) from t where b like '%77%';")


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    group: str  # "compute", "floating", "kernel" or "threads"
    words: list  # the command; {} in a word is the repetition count
    count: object  # repetitions (or what stands for them), about 0.1 s of native time
    interpret_count: object  # the same for the reference engine; None: left out, it would take a minute or more
    reads: str = "-"  # the file that is standard input; {} as above
    cpus: int = 1

    def line(self, count):
        """Its line in the runner's list."""
        return "\t".join([self.name, self.reads.replace("{}", str(count)), *(word.replace("{}", str(count)) for word in self.words)])


def own(name, group, binary, count, share=20, **options):
    return Workload(name, group, [f"bin/{binary}", options.pop("kernel", name), "{}"], count, math.ceil(count / share), **options)


WORKLOADS = [
    own("integer", "compute", "compute", 30_000_000, share=40),
    own("sieve", "compute", "compute", 200),
    own("sort", "compute", "compute", 10),
    own("calls", "compute", "compute", 60),
    own("chase", "compute", "compute", 2_000_000),
    own("memcpy", "compute", "compute", 1000),
    Workload("rsa", "compute", [*program("crypto"), "rsa", "{}"], 200, 10),
    Workload("gzip", "compute", [*program("gzip"), "-nc"], "2048k", "256k", reads="data/text-{}"),
    Workload("xz", "compute", [*program("xz"), "-c"], "256k", "100k", reads="data/text-{}"),
    Workload("shell", "compute", [*program("dash"), "-c", "i=0; while [ $i -lt {} ]; do i=$((i + 1)); done; echo $i"], 100_000, 5000),
    Workload("python3", "compute", [*program("python"), "-S", "data/text.py", "{}"], 10, 1),
    Workload("perl", "compute", [*program("perl"), "data/text.pl", "{}"], 5, 1),
    Workload("sqlite3", "compute", [*program("sqlite3"), ":memory:", SQL], 50_000, 2000),
    Workload("cc1", "compute", [*program("cc1"), "-quiet", "-fpreprocessed", "-O2", "-o", "-", "data/rect_pack.i"], 1, None),
    own("matrix", "floating", "floating", 100),
    own("nbody", "floating", "floating", 2_000_000),
    own("x87", "floating", "floating", 2_000_000),
    Workload("sha256", "floating", [*program("crypto"), "sha256", "{}"], 5000, 250),
    Workload("aes", "floating", [*program("crypto"), "aes", "{}"], 20_000, 1000),
    own("getppid", "kernel", "kernel", 500_000),
    own("pipe", "kernel", "kernel", 20_000),
    own("fork", "kernel", "kernel", 500),
    own("exec", "kernel", "kernel", 200),
    own("faults", "kernel", "kernel", 100),
    own("signals", "kernel", "kernel", 50_000),
    own("one", "threads", "threads", 50_000_000),
    own("locks", "threads", "threads", 2_000_000, cpus=2),
    own("two", "threads", "threads", 50_000_000, cpus=2),
]
TITLES = {"integer": "integer loop", "calls": "recursive calls", "chase": "pointer chase", "rsa": "RSA-2048 signatures (OpenSSL)",
          "shell": "shell loop (dash)", "cc1": "cc1 -O2 (gcc 12)", "matrix": "matrix product, double", "nbody": "n-body, double",
          "sha256": "SHA-256 (OpenSSL)", "aes": "AES-128-CTR (OpenSSL)", "pipe": "pipe ping-pong", "faults": "page faults",
          "locks": "two threads and a lock, 2 CPUs", "one": "one compute thread, 1 CPU", "two": "two compute threads, 2 CPUs"}
