// A machine for tests of x86/ and engine/: flat RAM from address 0, MMIO and ports that record what reaches them.
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "x86/cpu.h"

namespace anykvm::x86 {

class FakeMachine : public Machine {
 public:
  struct Access {
    u64 address;
    unsigned length;
    u64 data;
    bool operator==(const Access&) const = default;
  };

  explicit FakeMachine(u64 ram_bytes = 4 << 20) : ram(ram_bytes + page_size) {
    base = reinterpret_cast<u8*>((reinterpret_cast<u64>(ram.data()) + page_size - 1) & page_mask);
    size = ram_bytes;
  }

  std::vector<u8> ram;
  u8* base;                        ///< of guest-physical address 0, page-aligned
  u64 size;                        ///< above it everything is MMIO
  std::set<Gpa> read_only;         ///< pages of a read-only slot
  std::set<Gpa> dirty;             ///< pages announced for a store
  std::map<Gpa, u64> mmio_values;  ///< in-kernel devices: reads are answered from here
  std::set<Gpa> mmio_sinks;        ///< ... and stores to these addresses are taken
  std::vector<Access> mmio_writes, pio_writes;
  std::map<u16, u32> ports;                      ///< in-kernel ports
  std::map<u64, std::vector<u32>> cpuid_leaves;  ///< leaf << 32 | subleaf -> eax, ebx, ecx, edx
  std::map<u32, u64> msrs;                       ///< MSRs of the machine's own
  u64 cr8 = 0;
  unsigned windows = 0;  ///< calls of interrupt_window_changed()
  unsigned hypercalls = 0;

  template <class T>
  T get(Gpa gpa) const {
    T value;
    std::memcpy(&value, base + gpa, sizeof value);
    return value;
  }
  template <class T>
  void put(Gpa gpa, T value) {
    std::memcpy(base + gpa, &value, sizeof value);
  }

  HostPage page(Gpa gpa, bool for_write) override {
    gpa &= page_mask;
    if (gpa >= size) return {};
    const bool writable = !read_only.contains(gpa);
    if (for_write && writable) dirty.insert(gpa);
    return {base + gpa, writable};
  }
  bool mmio_read(Gpa gpa, void* data, unsigned length) override {
    auto it = mmio_values.find(gpa);
    if (it == mmio_values.end()) return false;
    std::memcpy(data, &it->second, length);
    return true;
  }
  bool mmio_write(Gpa gpa, const void* data, unsigned length) override {
    if (!mmio_sinks.contains(gpa)) return false;
    u64 value = 0;
    std::memcpy(&value, data, length);
    mmio_writes.push_back({gpa, length, value});
    return true;
  }
  bool pio_in(u16 port, void* data, unsigned size) override {
    auto it = ports.find(port);
    if (it == ports.end()) return false;
    std::memcpy(data, &it->second, size);
    return true;
  }
  bool pio_out(u16 port, const void* data, unsigned size) override {
    if (!ports.contains(port)) return false;
    u64 value = 0;
    std::memcpy(&value, data, size);
    pio_writes.push_back({port, size, value});
    return true;
  }
  MsrResult read_msr(u32 index, u64& value) override {
    auto it = msrs.find(index);
    if (it == msrs.end()) return MsrResult::not_mine;
    value = it->second;
    return MsrResult::ok;
  }
  MsrResult write_msr(u32 index, u64 value) override {
    auto it = msrs.find(index);
    if (it == msrs.end()) return MsrResult::not_mine;
    it->second = value;
    return MsrResult::ok;
  }
  void cpuid(u32 leaf, u32 subleaf, u32 out[4]) override {
    auto it = cpuid_leaves.find(u64(leaf) << 32 | subleaf);
    for (unsigned i = 0; i < 4; ++i) out[i] = it == cpuid_leaves.end() ? 0 : it->second[i];
  }
  u64 read_cr8() override { return cr8; }
  Result write_cr8(u64 value) override {
    cr8 = value;
    return Result::ok;
  }
  Result hypercall() override {
    ++hypercalls;
    return Result::ok;
  }
  void interrupt_window_changed() override { ++windows; }
};

}  // namespace anykvm::x86
