// The dirty log: what a guest has stored to, asked for and taken back while it runs.
#include <gtest/gtest.h>

#include <functional>

#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

class DirtyLog : public TestMachine {
 protected:
  static constexpr u32 logged = 1;
  static constexpr Gpa logged_at = 0x100000;

  /// A logged slot of 100 pages over the RAM at 1 MiB.
  void add_logged_slot(u64 pages = 100) {
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, logged_at, ram)), -EINVAL);  // a slot keeps its size
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, 0, nullptr)), 0);
    EXPECT_EQ(machine->set_user_memory_region(slot(0, 0, logged_at, ram)), 0);
    EXPECT_EQ(machine->set_user_memory_region(
                  slot(logged, logged_at, pages * page_size, ram + logged_at, KVM_MEM_LOG_DIRTY_PAGES)),
              0);
  }
  int enable(u64 options, u32 flags = 0) {
    return machine->enable_cap({.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .flags = flags, .args = {options}});
  }
  std::vector<u64> log(u64 pages = 100) {
    std::vector<u64> bitmap((pages + 63) / 64, 0xaaaaaaaaaaaaaaaa);
    kvm_dirty_log args{.slot = logged, .dirty_bitmap = bitmap.data()};
    EXPECT_EQ(machine->get_dirty_log(args), 0);
    return bitmap;
  }
  int clear(u64 first, u32 pages, std::vector<u64> bits, u32 id = logged) {
    bits.resize(16);
    return machine->clear_dirty_log({.slot = id, .num_pages = pages, .first_page = first, .dirty_bitmap = bits.data()});
  }
  /// A guest that stores AL to page EBX >> 12 of the logged slot, and reports at port 0x10.
  void start_storing(u64 page, u8 value) {
    if (vcpus.empty()) {
      start_long_mode(add_vcpu(), {
                                      0x88, 0x03,  // mov [rbx], al
                                      0xe6, 0x10,  // out 0x10, al
                                      0xeb, 0xfa,  // jmp to the mov
                                  });
    }
    kvm_regs r = regs();
    r.rbx = logged_at + page * page_size;
    r.rax = value;
    EXPECT_EQ(vcpus[0]->set_regs(r), 0);
    EXPECT_EQ(vcpus[0]->run(), 0);
    EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  }
};

TEST_F(DirtyLog, AReadClearsTheLogAndTheNextStoreIsInTheNext) {
  add_logged_slot();
  EXPECT_EQ(log(), (std::vector<u64>{0, 0}));
  start_storing(3, 1);
  start_storing(70, 1);
  EXPECT_EQ(log(), (std::vector<u64>{8, 64}));
  EXPECT_EQ(log(), (std::vector<u64>{0, 0}));
  start_storing(3, 2);  // through a pointer that it had
  EXPECT_EQ(log(), (std::vector<u64>{8, 0}));
}

TEST_F(DirtyLog, ABitmapThatCannotBeWrittenLosesNothing) {
  add_logged_slot();
  start_storing(5, 1);
  void* const bad = mmap(nullptr, page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  kvm_dirty_log args{.slot = logged, .dirty_bitmap = bad};
  EXPECT_EQ(machine->get_dirty_log(args), -EFAULT);
  munmap(bad, page_size);
  EXPECT_EQ(log(), (std::vector<u64>{32, 0}));
}

TEST_F(DirtyLog, ManualProtectLeavesTheBitsUntilTheyAreCleared) {
  EXPECT_EQ(enable(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0);
  add_logged_slot();
  start_storing(3, 1);
  start_storing(66, 1);
  EXPECT_EQ(log(), (std::vector<u64>{8, 4}));
  EXPECT_EQ(log(), (std::vector<u64>{8, 4}));
  EXPECT_EQ(clear(0, 64, {8}), 0);
  EXPECT_EQ(log(), (std::vector<u64>{0, 4}));
  EXPECT_EQ(clear(64, 36, {~0ull}), 0);
  EXPECT_EQ(log(), (std::vector<u64>{0, 0}));
  start_storing(66, 2);
  EXPECT_EQ(log(), (std::vector<u64>{0, 4}));
}

TEST_F(DirtyLog, InitiallySetReportsEveryPageOnce) {
  EXPECT_EQ(enable(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET), 0);
  add_logged_slot();
  EXPECT_EQ(log(), (std::vector<u64>{~0ull, (1ull << 36) - 1}));
  EXPECT_EQ(clear(0, 100, {~0ull, ~0ull}), 0);
  EXPECT_EQ(log(), (std::vector<u64>{0, 0}));
}

TEST_F(DirtyLog, ManualProtectIsRefusedWhenItsOptionsAreNot) {
  EXPECT_EQ(enable(KVM_DIRTY_LOG_INITIALLY_SET), -EINVAL);
  EXPECT_EQ(enable(4), -EINVAL);
  EXPECT_EQ(enable(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | 4), -EINVAL);
  EXPECT_EQ(enable(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, 1), -EINVAL);
  EXPECT_EQ(enable(0), 0);
}

TEST_F(DirtyLog, ClearChecksItsRange) {
  add_logged_slot();
  start_storing(1, 1);
  EXPECT_EQ(clear(1, 64, {~0ull}), -EINVAL);           // not a multiple of 64
  EXPECT_EQ(clear(128, 0, {~0ull}), -EINVAL);          // behind the end
  EXPECT_EQ(clear(0, 63, {~0ull}), -EINVAL);           // neither whole words nor the slot's end
  EXPECT_EQ(clear(64, 37, {~0ull}), -EINVAL);          // longer than the slot
  EXPECT_EQ(clear(0, 64, {~0ull}, 0), -ENOENT);        // not logged
  EXPECT_EQ(clear(0, 64, {~0ull}, 7), -ENOENT);        // not there
  EXPECT_EQ(clear(0, 64, {~0ull}, 0x10000), -EINVAL);  // another address space
  EXPECT_EQ(clear(0, 64, {~0ull}, 32764), -EINVAL);    // no such slot number
  EXPECT_EQ(machine->clear_dirty_log({.slot = logged, .num_pages = 64, .first_page = 0, .dirty_bitmap = nullptr}),
            -EFAULT);
  EXPECT_EQ(log(), (std::vector<u64>{2, 0}));
}

TEST_F(DirtyLog, Region2IsTheSameWithoutItsMemfd) {
  kvm_userspace_memory_region2 region{.slot = 5,
                                      .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                      .guest_phys_addr = 0x10000000,
                                      .memory_size = page_size,
                                      .userspace_addr = reinterpret_cast<u64>(ram)};
  EXPECT_EQ(machine->set_user_memory_region2(region), 0);
  region.slot = 6, region.guest_phys_addr = 0x20000000, region.flags = 4;  // KVM_MEM_GUEST_MEMFD
  EXPECT_EQ(machine->set_user_memory_region2(region), -EINVAL);
  region.slot = 5, region.flags = 0, region.memory_size = 0;
  EXPECT_EQ(machine->set_user_memory_region2(region), 0);
}

/// Every page holds a counter that the guest counts up without end. Between two logs the client copies the pages that
/// the log names; at the end its copy must be the RAM, or a store was never reported.
void copy_while_it_runs(vcpu::Vcpu& vcpu, const u8* ram, u64 pages, const std::function<std::vector<u64>()>& take_log) {
  std::vector<u8> copy(ram, ram + pages * page_size);
  std::atomic<bool> stop{false};
  int result = 0;
  std::thread runner([&] {
    while (!stop && (result = vcpu.run()) == 0) {
    }
  });
  const auto copy_dirty = [&] {
    const std::vector<u64> bitmap = take_log();
    u64 dirty = 0;
    for (u64 page = 0; page < pages; ++page)
      if (bitmap[page / 64] >> page % 64 & 1) {
        std::memcpy(copy.data() + page * page_size, ram + page * page_size, page_size);
        ++dirty;
      }
    return dirty;
  };
  u64 rounds = 0, dirty = 0;
  const u64 end = os::monotonic_ns() + 300'000'000;
  while (os::monotonic_ns() < end || (rounds < 20 && dirty == 0)) {
    dirty += copy_dirty();
    ++rounds;
  }
  stop = true;
  runner.join();
  EXPECT_EQ(result, 0);
  copy_dirty();
  EXPECT_GT(dirty, 0u);
  EXPECT_EQ(std::memcmp(copy.data(), ram, copy.size()), 0) << rounds << " rounds";
}

/// Counts up the first word of one page after the other; a port write every 65536 stores lets it be stopped.
constexpr std::initializer_list<u8> counting_guest = {
    0xff, 0x03,                                // loop: inc dword [rbx]
    0x48, 0x81, 0xc3, 0x00, 0x10, 0x00, 0x00,  // add rbx, 4096
    0x48, 0x39, 0xcb,                          // cmp rbx, rcx
    0x72, 0x03,                                // jb skip
    0x48, 0x89, 0xd3,                          // mov rbx, rdx
    0x66, 0xff, 0xc0,                          // skip: inc ax
    0x75, 0xea,                                // jnz loop
    0xe6, 0x10,                                // out 0x10, al
    0xeb, 0xe6,                                // jmp loop
};

TEST_F(DirtyLog, NoStoreOfARunningGuestIsLost) {
  for (const bool manual : {false, true}) {
    if (manual) {
      EXPECT_EQ(enable(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0);
    } else {
      add_logged_slot();
      add_vcpu();
    }
    start_long_mode(*vcpus[0], counting_guest);
    kvm_regs r = regs();
    r.rbx = r.rdx = logged_at;
    r.rcx = logged_at + 100 * page_size;
    EXPECT_EQ(vcpus[0]->set_regs(r), 0);
    copy_while_it_runs(*vcpus[0], ram + logged_at, 100, [&] {
      std::vector<u64> bitmap = log();
      if (manual) {
        EXPECT_EQ(clear(0, 100, bitmap), 0);
      }
      return bitmap;
    });
  }
}

}  // namespace
}  // namespace anykvm
