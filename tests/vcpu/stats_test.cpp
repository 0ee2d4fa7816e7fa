// KVM_GET_STATS_FD: a file whose counters count.
#include <fcntl.h>
#include <unistd.h>

#include <string>

#include "vcpu/test_machine.h"

namespace anykvm {
namespace {

class Stats : public TestMachine {
 protected:
  /// The value of a counter as a client finds it.
  static s64 read_stat(int fd, const std::string& name, std::string* id = nullptr) {
    kvm_stats_header header;
    EXPECT_EQ(pread(fd, &header, sizeof header, 0), static_cast<ssize_t>(sizeof header));
    EXPECT_EQ(header.flags, 0u);
    std::vector<char> text(header.name_size);
    if (id) {
      EXPECT_EQ(pread(fd, text.data(), text.size(), header.id_offset), static_cast<ssize_t>(text.size()));
      *id = text.data();
    }
    for (u32 i = 0; i < header.num_desc; ++i) {
      const off_t at = header.desc_offset + i * (sizeof(kvm_stats_desc) + header.name_size);
      kvm_stats_desc descriptor;
      EXPECT_EQ(pread(fd, &descriptor, sizeof descriptor, at), static_cast<ssize_t>(sizeof descriptor));
      EXPECT_EQ(pread(fd, text.data(), text.size(), at + static_cast<off_t>(sizeof descriptor)),
                static_cast<ssize_t>(text.size()));
      if (name != text.data()) continue;
      EXPECT_EQ(descriptor.size, 1);
      s64 value;
      EXPECT_EQ(pread(fd, &value, sizeof value, header.data_offset + descriptor.offset), 8);
      // The data is the file's last part.
      EXPECT_EQ(lseek(fd, 0, SEEK_END), static_cast<off_t>(header.data_offset + 8 * header.num_desc));
      return value;
    }
    return -1;
  }
};

TEST_F(Stats, AVcpuCountsItsExits) {
  vcpu::Vcpu& vcpu = add_vcpu();
  start_real_mode(vcpu, {
                            0xe6, 0x10,  // out 0x10, al
                            0xe4, 0x10,  // in al, 0x10
                            0xf4,        // hlt
                        });
  EXPECT_EQ(vcpu.run(), 0);  // counted before anybody looked
  const int fd = vcpu.get_stats_fd();
  ASSERT_GE(fd, 0);
  std::string id;
  EXPECT_EQ(read_stat(fd, "io_exits", &id), 1);
  EXPECT_EQ(id, "kvm-" + std::to_string(getpid()) + "/vcpu-0");
  EXPECT_EQ(vcpu.run(), 0);
  EXPECT_EQ(vcpu.run(), 0);
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_HLT});
  EXPECT_EQ(read_stat(fd, "io_exits"), 2);
  EXPECT_EQ(read_stat(fd, "halt_exits"), 1);
  EXPECT_GE(read_stat(fd, "exits"), 3);
  EXPECT_EQ(read_stat(fd, "nonsense"), -1);
  const int again = vcpu.get_stats_fd();
  EXPECT_EQ(read_stat(again, "io_exits"), 2);
  // Read-only, close-on-exec, and the file outlives its vCPU.
  EXPECT_EQ(write(fd, "", 1), -1);
  EXPECT_TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  close(again);
  vcpus.clear();
  EXPECT_EQ(read_stat(fd, "io_exits"), 2);
  close(fd);
}

TEST_F(Stats, EventsAreCounted) {
  EXPECT_EQ(machine->create_irqchip(), 0);
  vcpu::Vcpu& vcpu = add_vcpu();
  const int fd = vcpu.get_stats_fd();
  start_long_mode(vcpu, {0xf4, 0xe6, 0x10});  // hlt; out 0x10, al
  set_gate(2, code_at + 0x100);
  put(code_at + 0x100, {0x48, 0xcf});  // iretq
  std::thread other([&] {
    EXPECT_TRUE(eventually([&] { return read_stat(fd, "blocking") == 1; }));
    vcpu.signal_nmi();
  });
  EXPECT_EQ(vcpu.run(), 0);
  other.join();
  EXPECT_EQ(run().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(read_stat(fd, "nmi_injections"), 1);
  EXPECT_EQ(read_stat(fd, "halt_wakeup"), 1);
  EXPECT_GT(read_stat(fd, "halt_wait_ns"), 0);
  EXPECT_EQ(read_stat(fd, "blocking"), 0);
  close(fd);
}

TEST_F(Stats, TheVmCountsFlushes) {
  add_vcpu();
  const int fd = machine->get_stats_fd();
  ASSERT_GE(fd, 0);
  const s64 before = read_stat(fd, "remote_tlb_flush");
  EXPECT_EQ(machine->set_user_memory_region(slot(1, 0x10000000, page_size, ram)), 0);
  EXPECT_EQ(read_stat(fd, "remote_tlb_flush"), before + 1);
  close(fd);
}

}  // namespace
}  // namespace anykvm
