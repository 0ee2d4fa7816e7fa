#include "vm/stats.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "anykvm/kvm.h"

namespace anykvm::vm {
namespace {

constexpr u32 counter = KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
constexpr u32 nanoseconds = KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_SECONDS | KVM_STATS_BASE_POW10;
constexpr u32 yes_or_no = KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BOOLEAN | KVM_STATS_BASE_POW10;
constexpr u32 name_size = 48;
constexpr u32 descriptor_size = sizeof(kvm_stats_desc) + name_size;

}  // namespace

const StatDescription vm_stats[] = {
    {"remote_tlb_flush", counter},
    {"remote_tlb_flush_requests", counter},
};

const StatDescription vcpu_stats[] = {
    {"exits", counter},
    {"io_exits", counter},
    {"mmio_exits", counter},
    {"signal_exits", counter},
    {"request_irq_exits", counter},
    {"halt_exits", counter},
    {"halt_wakeup", counter},
    {"halt_wait_ns", nanoseconds, -9},
    {"blocking", yes_or_no},
    {"hypercalls", counter},
    {"irq_injections", counter},
    {"nmi_injections", counter},
    {"insn_emulation", counter},
    {"insn_emulation_fail", counter},
    {"tlb_flush", counter},
    {"page_walks", counter},
    {"translations", counter},
    {"native_stretches", counter},
};

StatsFile::~StatsFile() {
  if (fd_ >= 0) os::close_file(fd_);
}

int StatsFile::open(const std::string& id) {
  if (fd_ < 0)
    if (const int error = create(id)) return error;
  // Not a duplicate: each descriptor has its own position, and none can write.
  char path[32];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd_);
  const int reader = ::open(path, O_RDONLY | O_CLOEXEC);
  return reader < 0 ? -errno : reader;
}

std::size_t StatsFile::image_size() const {
  return sizeof(kvm_stats_header) + name_size + descriptions_.size() * (descriptor_size + sizeof(u64));
}

u64* StatsFile::write_image(u8* image, const std::string& id) const {
  const u32 count = static_cast<u32>(descriptions_.size());
  kvm_stats_header header{.name_size = name_size, .num_desc = count, .id_offset = sizeof header};
  header.desc_offset = header.id_offset + name_size;
  header.data_offset = header.desc_offset + count * descriptor_size;
  std::memcpy(image, &header, sizeof header);
  std::memcpy(image + header.id_offset, id.data(), std::min<std::size_t>(id.size(), name_size - 1));
  for (u32 i = 0; i < count; ++i) {
    u8* const at = image + header.desc_offset + i * descriptor_size;
    const StatDescription& description = descriptions_[i];
    const kvm_stats_desc descriptor{.flags = description.flags,
                                    .exponent = description.exponent,
                                    .size = 1,
                                    .offset = static_cast<u32>(i * sizeof(u64))};
    std::memcpy(at, &descriptor, sizeof descriptor);
    std::strncpy(reinterpret_cast<char*>(at) + sizeof descriptor, description.name, name_size - 1);
  }
  u64* const values = reinterpret_cast<u64*>(image + header.data_offset);
  std::copy_n(values_, count, values);
  return values;
}

int StatsFile::create(const std::string& id) {
  const std::size_t size = image_size();
  const int fd = os::create_memory_file("kvm-stats", size);
  if (fd < 0) return fd;
  os::Mapping mapping(fd, size);
  if (!mapping.data()) {
    os::close_file(fd);
    return -ENOMEM;
  }
  in_file_ = write_image(static_cast<u8*>(mapping.data()), id);
  file_ = std::move(mapping);
  fd_ = fd;
  return 0;
}

void StatsFile::publish(os::Mapping page, const std::string& id) {
  values_ = write_image(static_cast<u8*>(page.data()), id);
  page_ = std::move(page);
}

}  // namespace anykvm::vm
