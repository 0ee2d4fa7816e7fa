# The short front of the build. Everything lands in build/ and cache/, both ignored by git.
PRESET ?= release
BUILD = build/$(PRESET)

.PHONY: help run build test bench asan tsan fuzz fuzz-system fuzz-isa fuzz-ioctl fuzz-guest fuzz-loader tidy format clean packages guests programs debian clients selftests stress

help:
	@echo "make run      boot Debian's cloud kernel on the software engine, to a shell (without a terminal: report and power off)"
	@echo "make test     build, then the unit and system tests"
	@echo "make build    build/release/bin/anykvm, build/release/lib/libanykvm.so (PRESET=debug|asan|tsan for the others)"
	@echo "make clients  set up Debian 12 on a disk and libguestfs, which takes minutes, and run the tests of all real clients"
	@echo "make bench    measure workloads natively, here and in QEMU's TCG: one table (ROUNDS=1 ONLY=sieve,boot: a quick look)"
	@echo "make asan     all tests under the address and undefined-behaviour sanitizers"
	@echo "make tsan     the unit tests, and a boot on 4 CPUs, under the thread sanitizer"
	@echo "make selftests  the kernel's own KVM selftests on the engine, into docs/selftests.md"
	@echo "make fuzz     fuzz the ioctls, guest code and the loader, FUZZ_TIME seconds each (fuzz-ioctl, fuzz-guest: one of them)"
	@echo "make fuzz-system  system instructions and modes against QEMU's TCG (SEED, ROUNDS)"
	@echo "make fuzz-isa  every instruction form against the host CPU (COUNT instances a mode, SEED)"
	@echo "make stress   Linux 6.1 and 6.12 on 4 CPUs under load: tracers, probes, modules, forks, little memory, LuaJIT, stress-ng; 200 resets"
	@echo "make tidy     clang-tidy over the sources"
	@echo "make format   clang-format over the sources"
	@echo "make clean    remove build/ (cache/, the fetched guests, stays)"

packages:
	@scripts/setup build

guests:
	@scripts/fetch-guests 6.1 6.12 6.1-generic 6.1-i386

# What tests run in the guests.
programs:
	@scripts/fetch-programs

$(BUILD)/build.ninja: | packages
	@cmake --preset $(PRESET)

# Real clients that take minutes to set up; their tests are skipped where they are not.
debian:
	@scripts/setup debian libguestfs
	@scripts/fetch-debian

build: packages $(BUILD)/build.ninja
	@cmake --build $(BUILD)

run: packages build/release/build.ninja
	@cmake --build build/release --target anykvm_tool
	@scripts/fetch-guests 6.1
	@scripts/run-guest

# The system tests also boot the sanitized build: only its command is built for that.
test: packages build guests programs
	@scripts/setup test
	@cmake --preset asan >/dev/null && cmake --build build/asan --target anykvm_tool
	@ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j $$(nproc)

clients: build guests debian
	@scripts/setup test
	@ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j $$(nproc) -L clients

asan: packages guests programs
	@$(MAKE) PRESET=asan build
	@ctest --test-dir build/asan --output-on-failure --no-tests=error -j $$(nproc)

# The long form of `ctest -L stress` and of QEMU's resets, with the parts that are too slow there; it takes hours.
stress: build guests programs
	@scripts/setup test
	@python3 tests/clients/qemu_features.py --anykvm $(BUILD)/bin/anykvm --resets 200 reset
	@for guest in 6.1 6.12; do \
	  for part in ftrace:1000 patching:1000 modules:500 forks:5000 reclaim:300; do \
	    python3 tests/system/stress.py --anykvm $(BUILD)/bin/anykvm --guest $$guest --timeout 14400 \
	      $${part%:*} --rounds $${part#*:} || exit 1; \
	  done; \
	  for cpus in 1 4; do \
	    python3 tests/system/jit.py --anykvm $(BUILD)/bin/anykvm --guest $$guest --timeout 14400 \
	      --cpus $$cpus --rounds 1000 || exit 1; \
	  done; \
	  python3 tests/system/stress_ng.py --anykvm $(BUILD)/bin/anykvm --guest $$guest --seconds 100 || exit 1; \
	done

# Some ten minutes; the first time also a download of 150 MB and a minute of building.
selftests: packages build
	@scripts/setup selftests
	@scripts/kvm-selftests --table docs/selftests.md

# Not isa: one thread, and wild addresses that hit the sanitizer's own memory.
tsan: packages guests
	@$(MAKE) PRESET=tsan build
	@ctest --test-dir build/tsan --output-on-failure --no-tests=error -j $$(nproc) -L unit
	@ctest --test-dir build/tsan --output-on-failure --no-tests=error -R '^system\.linux-6\.(1-smp4|12-smp4-translate)$$'

FUZZ_TIME ?= 60
fuzz:
	@scripts/fuzz $(FUZZ_TIME)
fuzz-ioctl fuzz-guest fuzz-loader: fuzz-%:
	@scripts/fuzz $(FUZZ_TIME) $*

# The checks of .clang-tidy over every file of src/, with clang's options.
tidy: packages
	@scripts/setup tidy
	@cmake --preset tidy >/dev/null
	@git ls-files 'src/*.cpp' | xargs run-clang-tidy-19 -quiet -j $$(nproc) -p build/tidy -warnings-as-errors='*'

# System instructions, gates, tasks, modes, paging and debugging against QEMU's TCG: ROUNDS guests of 2,000 tests each
# for every subject, with tests that no run before has had, on both engines.
fuzz-system: packages $(BUILD)/build.ninja
	@scripts/setup test
	@cmake --build $(BUILD) --target oracle_tests
	@export ANYKVM_ORACLE_SEED=$${SEED:-$$(date +%s)} ANYKVM_ORACLE_ROUNDS=$${ROUNDS:-20}; \
	for engine in interpret translate-exact; do ANYKVM_ENGINE=$$engine $(BUILD)/bin/oracle_tests || exit 1; done

# Some twenty minutes. ROUNDS=1 and ONLY=sieve,boot (bench/workloads.py) for a quick look; OPTIONS: see bench/run --help.
ROUNDS ?= 5
bench: packages guests
	@$(MAKE) PRESET=release build
	@scripts/setup bench
	@bench/run --rounds $(ROUNDS) --only "$(ONLY)" $(OPTIONS)

format:
	@scripts/setup format
	@git ls-files '*.cpp' '*.h' | xargs clang-format -i

clean:
	@rm -rf build
