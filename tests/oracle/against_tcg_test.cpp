// Segmentation, gates, task switches and modes against QEMU's TCG: the same guest runs in the engine and in QEMU, and
// leaves the same memory behind.
//
// Where TCG (7.2) is wrong by the manuals, legacy_guest.cpp leaves the case out or compares around it, and says so: RF of
// pushed flags, accessed bits, limits and types of data accesses, an absent outer stack (#SS), conforming code behind a
// call gate, faults of a new task, STI under TF, ICEBP, VIF and VIP from IRET.
//
// ANYKVM_ORACLE_SEED and ANYKVM_ORACLE_ROUNDS choose other tests and more (`make fuzz-system`).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "engine/engine.h"
#include "oracle/legacy_guest.h"
#include "oracle/monitor.h"
#include "x86/fake_machine.h"

namespace anykvm::oracle {
namespace {

constexpr unsigned tests_per_guest = 2000;

std::vector<u8> run_in_engine(const std::vector<u8>& image, std::string& end) {
  using namespace x86;
  FakeMachine machine(guest_ram);
  std::memcpy(machine.base, image.data(), image.size());
  machine.ports[0x80] = 0;
  Cpu cpu(machine);
  cpu.cpuid.set(supported_cpuid());
  cpu.reset();
  u8 pio[page_size];
  cpu.pio_data = pio;
  cpu.state.segment[cs].selector = 0;
  cpu.state.segment[cs].base = 0;
  cpu.state.rip = MONITOR_BOOT;
  cpu.update_mode();
  const auto engine = engine::make_interpreter();
  // A 16-bit task's stack may lie in QEMU's firmware, which is filled with HLT.
  static constexpr u8 firmware[8] = {0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4};
  for (engine->run(cpu); cpu.exit.kind == ExitKind::mmio_read || cpu.exit.kind == ExitKind::mmio_write;
       engine->run(cpu)) {
    if (cpu.exit.kind == ExitKind::mmio_read) cpu.mmio.reply(firmware);
    while (cpu.mmio.has_writes()) cpu.mmio.pop_write();
  }
  if (cpu.exit.kind != ExitKind::pio || cpu.exit.port != MONITOR_EXIT_PORT) {
    end = "exit " + std::to_string(int(cpu.exit.kind)) + " at " + std::to_string(cpu.state.rip);
    if (cpu.exit.reason) end += std::string(": ") + cpu.exit.reason;
  }
  return {machine.base, machine.base + guest_ram};
}

bool qemu_is_there() { return std::system("command -v qemu-system-x86_64 >/dev/null 2>&1") == 0; }

/// QEMU with the image as its RAM, which lies in a file. Its firmware is one jump.
std::vector<u8> run_in_qemu(const std::vector<u8>& image) {
  char directory[] = "/tmp/anykvm-oracle-XXXXXX";
  if (!mkdtemp(directory)) return {};
  const std::string base = directory;
  std::ofstream(base + "/ram", std::ios::binary).write(reinterpret_cast<const char*>(image.data()), s64(image.size()));
  std::vector<u8> bios(65536, 0xf4);
  const u8 jump[] = {0xea, MONITOR_BOOT & 0xff, MONITOR_BOOT >> 8, 0, 0};
  std::memcpy(&bios[0xfff0], jump, sizeof jump);
  std::ofstream(base + "/bios", std::ios::binary).write(reinterpret_cast<const char*>(bios.data()), s64(bios.size()));
  const std::string command =
      "timeout 100 qemu-system-x86_64 -accel tcg -cpu max -nodefaults -no-user-config -display none -no-reboot -m 8M "
      "-machine pc,memory-backend=ram -object memory-backend-file,id=ram,size=8M,share=on,mem-path=" +
      base + "/ram -bios " + base + "/bios -device isa-debug-exit,iobase=0xf4,iosize=1 </dev/null >" + base +
      "/output 2>&1";
  if (std::system(command.c_str()) == -1) return {};
  std::vector<u8> memory(guest_ram);
  std::ifstream(base + "/ram", std::ios::binary).read(reinterpret_cast<char*>(memory.data()), s64(memory.size()));
  std::ifstream output(base + "/output");
  std::cout << output.rdbuf();
  std::filesystem::remove_all(base);
  return memory;
}

u64 from_environment(const char* name, u64 otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

TEST(AgainstTcg, SegmentsGatesTasksAndModes) {
  if (!qemu_is_there()) GTEST_SKIP() << "no qemu-system-x86_64";
  const u64 first = from_environment("ANYKVM_ORACLE_SEED", 1), rounds = from_environment("ANYKVM_ORACLE_ROUNDS", 1);
  for (u64 seed = first; seed < first + rounds; ++seed) {
    const std::vector<u8> image = legacy_guest(seed, tests_per_guest);
    std::string end;
    const std::vector<u8> ours = run_in_engine(image, end), theirs = run_in_qemu(image);
    ASSERT_EQ(theirs.size(), ours.size());
    const int different = first_difference(ours, theirs, tests_per_guest);
    EXPECT_EQ(different, -1) << "seed " << seed << ", ours | QEMU's\n"
                             << describe(image, ours, theirs, unsigned(different));
    EXPECT_EQ(end, "") << "seed " << seed << ", test " << tests_done(ours) << "\n"
                       << describe(image, ours, theirs, tests_done(ours));
    EXPECT_EQ(tests_done(ours), tests_per_guest);
    EXPECT_EQ(tests_done(theirs), tests_per_guest) << "seed " << seed;
    if (testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace anykvm::oracle
