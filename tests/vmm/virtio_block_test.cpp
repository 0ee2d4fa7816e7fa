// virtio-blk on files: requests, their errors, and what is not accepted as a disk.
#include "vmm/virtio/block.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <linux/virtio_ids.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>

#include "virtio_driver.h"
#include "vmm/virtio/devices.h"

namespace anykvm::vmm {
namespace {

using testing::HasSubstr;

/// A file in a folder of its own, with bytes that tell their place.
class TemporaryFile {
 public:
  explicit TemporaryFile(size_t size) {
    char folder[] = "/tmp/anykvm-disk-XXXXXX";
    folder_ = mkdtemp(folder);
    path_ = folder_ + "/disk";
    std::vector<char> content(size);
    for (size_t i = 0; i < size; ++i) content[i] = static_cast<char>(i / 512 + i);
    std::ofstream(path_, std::ios::binary).write(content.data(), static_cast<std::streamsize>(size));
  }
  ~TemporaryFile() { std::filesystem::remove_all(folder_); }

  const std::string& path() const { return path_; }
  const std::string& folder() const { return folder_; }
  std::vector<u8> content() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void begin_with(std::string_view text, size_t offset = 0) const {
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(text.data(), static_cast<std::streamsize>(text.size()));
  }

 private:
  std::string folder_, path_;
};

constexpr u64 sectors = 64;
constexpr Gpa header_at = FakeDriver::buffers, data_at = header_at + 0x1000, status_at = header_at + 0x80000;

/// A driver of one disk; sends one request at a time.
class Disk {
 public:
  explicit Disk(const std::string& path, bool read_only = false, u64 without = 0)
      : driver_([&](EventLoop&) {
          return make_block({path, read_only, "serial-0123456789abcdef"});
        }) {
    driver_.start(1, without);
  }

  /// Data of `bytes` in two descriptors; returns the status byte.
  int request(u32 type, u64 sector, u32 bytes, bool device_writes) {
    FakeQueue& queue = driver_.queue();
    queue.put(header_at, virtio_blk_outhdr{type, 0, sector});
    queue.put<u8>(status_at, 0xee);
    const u16 direction = device_writes ? VRING_DESC_F_WRITE : 0;
    const u32 first = bytes / 2;
    queue.descriptor(0, header_at, sizeof(virtio_blk_outhdr), VRING_DESC_F_NEXT, 1);
    queue.descriptor(1, data_at, first, VRING_DESC_F_NEXT | direction, 2);
    queue.descriptor(2, data_at + first, bytes - first, VRING_DESC_F_NEXT | direction, 3);
    queue.descriptor(3, status_at, 1, VRING_DESC_F_WRITE);
    return send(0);
  }
  int send(u16 head) {
    FakeQueue& queue = driver_.queue();
    queue.offer(head);
    driver_.notify(0);
    EXPECT_TRUE(driver_.completed(0, ++sent_));
    written_ = queue.used(sent_ - 1).len;
    return queue.get<u8>(status_at);
  }
  int read(u64 sector, u32 bytes) { return request(VIRTIO_BLK_T_IN, sector, bytes, true); }
  int write(u64 sector, u32 bytes) { return request(VIRTIO_BLK_T_OUT, sector, bytes, false); }
  int zero(u32 type, std::vector<virtio_blk_discard_write_zeroes> ranges) {
    const std::span<const u8> raw(reinterpret_cast<const u8*>(ranges.data()), ranges.size() * sizeof(ranges[0]));
    driver_.memory().write(data_at, raw);
    return request(type, 0, static_cast<u32>(raw.size()), false);
  }

  std::vector<u8> data(u32 bytes) {
    const auto span = driver_.bytes(data_at, bytes);
    return {span.begin(), span.end()};
  }
  void set_data(const std::vector<u8>& bytes) { driver_.memory().write(data_at, bytes); }
  u32 written() const { return written_; }
  FakeDriver& driver() { return driver_; }

 private:
  FakeDriver driver_;
  u16 sent_ = 0;
  u32 written_ = 0;
};

std::vector<u8> slice(const std::vector<u8>& all, size_t begin, size_t count) {
  return {all.begin() + static_cast<std::ptrdiff_t>(begin), all.begin() + static_cast<std::ptrdiff_t>(begin + count)};
}

TEST(VirtioBlockTest, Reads) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  EXPECT_EQ(disk.driver().reg(VIRTIO_MMIO_DEVICE_ID), u32{VIRTIO_ID_BLOCK});
  EXPECT_EQ(disk.driver().reg(VIRTIO_MMIO_CONFIG), sectors);
  EXPECT_EQ(disk.read(3, 2048), VIRTIO_BLK_S_OK);
  EXPECT_EQ(disk.data(2048), slice(file.content(), 3 * 512, 2048));
  EXPECT_EQ(disk.written(), 2049u);
  EXPECT_EQ(disk.read(sectors - 1, 512), VIRTIO_BLK_S_OK);
  EXPECT_EQ(disk.read(0, 0), VIRTIO_BLK_S_OK);
  EXPECT_TRUE(FakeDriver::eventually([&] { return disk.driver().irq().level.load(); }));
}

TEST(VirtioBlockTest, WritesAndFlushes) {
  for (u64 without : {u64{0}, u64{1} << VIRTIO_BLK_F_FLUSH}) {
    TemporaryFile file(sectors * 512);
    auto expected = file.content();
    Disk disk(file.path(), false, without);
    const std::vector<u8> data(1024, 0x5a);
    disk.set_data(data);
    EXPECT_EQ(disk.write(10, 1024), VIRTIO_BLK_S_OK);
    EXPECT_EQ(disk.written(), 1u);
    EXPECT_EQ(disk.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), VIRTIO_BLK_S_OK);
    std::ranges::copy(data, expected.begin() + 10 * 512);
    EXPECT_EQ(file.content(), expected);
  }
}

TEST(VirtioBlockTest, RefusesWhatLiesOutside) {
  TemporaryFile file(sectors * 512);
  const auto before = file.content();
  Disk disk(file.path());
  EXPECT_EQ(disk.read(sectors, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.read(sectors - 1, 1024), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.written(), 0u);
  EXPECT_EQ(disk.read(~u64{0}, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.read(u64{1} << 55, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.read(0, 100), VIRTIO_BLK_S_IOERR) << "not whole sectors";
  EXPECT_EQ(disk.write(sectors, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.write(~u64{0} - 1, 1024), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.request(99, 0, 512, true), VIRTIO_BLK_S_UNSUPP);
  EXPECT_EQ(file.content(), before);
}

TEST(VirtioBlockTest, ReadOnlyDiskIsNotWritten) {
  TemporaryFile file(sectors * 512);
  const auto before = file.content();
  chmod(file.path().c_str(), 0444);
  Disk disk(file.path(), true);
  EXPECT_TRUE(disk.driver().offered() >> VIRTIO_BLK_F_RO & 1);
  EXPECT_EQ(disk.read(0, 512), VIRTIO_BLK_S_OK);
  EXPECT_EQ(disk.write(0, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), VIRTIO_BLK_S_OK);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{0, 1, 0}}), VIRTIO_BLK_S_UNSUPP);
  EXPECT_EQ(file.content(), before);
}

TEST(VirtioBlockTest, WritesZeroes) {
  TemporaryFile file(sectors * 512);
  auto expected = file.content();
  Disk disk(file.path());
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{2, 4, 0}, {20, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP}}),
            VIRTIO_BLK_S_OK);
  std::fill_n(expected.begin() + 2 * 512, 4 * 512, u8{0});
  std::fill_n(expected.begin() + 20 * 512, 512, u8{0});
  EXPECT_EQ(file.content(), expected);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_DISCARD, {{30, 2, 0}}), VIRTIO_BLK_S_OK);
  EXPECT_EQ(file.content().size(), expected.size());
}

TEST(VirtioBlockTest, RefusesImpossibleRanges) {
  TemporaryFile file(sectors * 512);
  const auto before = file.content();
  Disk disk(file.path());
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{sectors, 1, 0}}), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{1, sectors, 0}}), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{~u64{0}, 2, 0}}), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{0, 0xffffffff, 0}}), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, {{0, 1, 2}}), VIRTIO_BLK_S_UNSUPP);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_DISCARD, {{0, 1, 1}}), VIRTIO_BLK_S_UNSUPP);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_DISCARD, {}), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.zero(VIRTIO_BLK_T_DISCARD, std::vector<virtio_blk_discard_write_zeroes>(33, {0, 1, 0})),
            VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.request(VIRTIO_BLK_T_DISCARD, 0, 17, false), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(file.content(), before);
}

TEST(VirtioBlockTest, TellsItsSerialNumber) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  EXPECT_EQ(disk.request(VIRTIO_BLK_T_GET_ID, 0, 20, true), VIRTIO_BLK_S_OK);
  const auto id = disk.data(20);
  EXPECT_EQ(std::string(id.begin(), id.end()), "serial-0123456789abc");
}

TEST(VirtioBlockTest, RequestsMayBeCutAnywhere) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  FakeQueue& queue = disk.driver().queue();
  queue.put(header_at, virtio_blk_outhdr{VIRTIO_BLK_T_IN, 0, 1});
  queue.descriptor(0, header_at, 5, VRING_DESC_F_NEXT, 1);
  queue.descriptor(1, header_at + 5, 11, VRING_DESC_F_NEXT, 2);
  queue.descriptor(2, status_at - 512, 513, VRING_DESC_F_WRITE);
  EXPECT_EQ(disk.send(0), VIRTIO_BLK_S_OK);
  const auto data = disk.driver().bytes(status_at - 512, 512);
  EXPECT_TRUE(std::ranges::equal(data, slice(file.content(), 512, 512)));
}

TEST(VirtioBlockTest, RequestsWithoutHeaderOrStatusComeBack) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  FakeQueue& queue = disk.driver().queue();
  queue.descriptor(0, header_at, 15, VRING_DESC_F_NEXT, 1);
  queue.descriptor(1, status_at, 1, VRING_DESC_F_WRITE);
  disk.send(0);
  EXPECT_EQ(disk.written(), 0u);
  queue.descriptor(0, header_at, 16);
  disk.send(0);
  EXPECT_EQ(disk.written(), 0u);
  EXPECT_EQ(disk.read(0, 512), VIRTIO_BLK_S_OK) << "the disk goes on";
}

TEST(VirtioBlockTest, TruncatedUnderUsIsAnError) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  std::filesystem::resize_file(file.path(), 512);
  EXPECT_EQ(disk.read(8, 512), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(disk.read(0, 512), VIRTIO_BLK_S_OK);
}

TEST(VirtioBlockTest, ResetInTheMiddleOfWork) {
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  for (int round = 0; round < 200; ++round) {
    FakeQueue& queue = disk.driver().queue();
    queue.put(header_at, virtio_blk_outhdr{VIRTIO_BLK_T_IN, 0, 0});
    queue.descriptor(0, header_at, 16, VRING_DESC_F_NEXT, 1);
    queue.descriptor(1, data_at, sectors * 512, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 2);
    queue.descriptor(2, status_at, 1, VRING_DESC_F_WRITE);
    for (int i = 0; i < 8; ++i) queue.offer(0);
    disk.driver().notify(0);
    if (round % 2) std::this_thread::yield();
    disk.driver().start();
    EXPECT_FALSE(disk.driver().irq().level);
  }
}

// Whatever the guest writes into rings and requests, the device thread survives, and so does the file's size.
TEST(VirtioBlockTest, SurvivesRandomRequests) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "this guest changes requests under the device's feet: races are its purpose";
#endif
  TemporaryFile file(sectors * 512);
  Disk disk(file.path());
  FakeDriver& driver = disk.driver();
  std::mt19937 random(2);
  const auto below = [&](u32 limit) { return static_cast<u32>(random() % limit); };
  for (int round = 0; round < 3000; ++round) {
    if (round % 16 == 0 || driver.needs_reset()) driver.start();
    FakeQueue& queue = driver.queue();
    for (u32 i = 0; i < FakeDriver::queue_size; ++i) {
      const u32 type = below(8) ? below(16) : static_cast<u32>(random());
      const u64 sector = below(4) ? below(2 * sectors) : random();
      queue.put(header_at + i * 64, virtio_blk_outhdr{type, 0, sector});
      const u32 kind = below(16);
      const u16 next = static_cast<u16>((i + 1) % FakeDriver::queue_size);
      if (kind < 6)
        queue.descriptor(i, header_at + below(16) * 64, 16, VRING_DESC_F_NEXT, next);
      else if (kind < 11)
        queue.descriptor(i, data_at + below(100) * 512, below(9) * 512, 1 | below(2) * 2, next);
      else if (kind < 15)
        queue.descriptor(i, status_at, 1, VRING_DESC_F_WRITE, next);
      else
        queue.descriptor(i, random(), random(), below(8), static_cast<u16>(random()));
    }
    const unsigned chains = below(5);
    for (unsigned i = 0; i < chains; ++i) queue.offer(static_cast<u16>(below(FakeDriver::queue_size)));
    driver.notify(0);
    if (below(50) == 0) queue.announce(static_cast<u16>(random()));
  }
  driver.start();
  FakeQueue& queue = driver.queue();
  queue.put(header_at, virtio_blk_outhdr{VIRTIO_BLK_T_IN, 0, 0});
  queue.descriptor(0, header_at, 16, VRING_DESC_F_NEXT, 1);
  queue.descriptor(1, status_at - 512, 513, VRING_DESC_F_WRITE);
  queue.offer(0);
  driver.notify(0);
  EXPECT_TRUE(driver.completed(0, 1));
  EXPECT_EQ(queue.get<u8>(status_at), VIRTIO_BLK_S_OK);
  EXPECT_EQ(file.content().size(), sectors * 512);
}

std::string refusal(const std::string& path, bool read_only = false) {
  try {
    DiskImage image(path, read_only);
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr(path));
    return error.what();
  }
  return "accepted";
}

TEST(DiskImageTest, RefusesWhatIsNoDisk) {
  EXPECT_THAT(refusal("/nonexistent/disk"), HasSubstr("No such file"));
  EXPECT_THAT(refusal("/tmp"), HasSubstr("is a directory"));
  EXPECT_THAT(refusal("/tmp", true), HasSubstr("is a directory"));
  EXPECT_THAT(refusal("/dev/null"), HasSubstr("neither a file nor a block device"));
  TemporaryFile empty(0), odd(1000), pipe(512);
  EXPECT_THAT(refusal(empty.path()), HasSubstr("is empty"));
  EXPECT_THAT(refusal(odd.path()), HasSubstr("1000 bytes, not a multiple of 512"));
  std::filesystem::remove(pipe.path());
  mkfifo(pipe.path().c_str(), 0600);
  EXPECT_THAT(refusal(pipe.path(), true), HasSubstr("neither a file nor a block device"));
}

TEST(DiskImageTest, RefusesOtherFormats) {
  const std::pair<std::string_view, const char*> formats[] = {
      {"QFI\xfb", "qcow2"},
      {"KDMV", "VMDK"},
      {"vhdxfile", "VHDX"},
      {{"\xfd"
        "7zXZ\0",
        6},
       "xz"},
      {"\x1f\x8b\x08", "gzip"},
  };
  for (const auto& [magic, name] : formats) {
    TemporaryFile file(4096);
    file.begin_with(magic);
    EXPECT_THAT(refusal(file.path()), HasSubstr(name));
  }
  TemporaryFile vdi(4096);
  vdi.begin_with("\x7f\x10\xda\xbe", 64);
  EXPECT_THAT(refusal(vdi.path()), HasSubstr("VDI"));
  TemporaryFile raw(4096);
  EXPECT_EQ(refusal(raw.path()), "accepted");
}

TEST(DiskImageTest, LocksAgainstASecondWriter) {
  TemporaryFile file(4096);
  {
    DiskImage writer(file.path(), false);
    EXPECT_THAT(refusal(file.path()), HasSubstr("in use by another program"));
    EXPECT_THAT(refusal(file.path(), true), HasSubstr("is being written"));
  }
  DiskImage reader(file.path(), true);
  EXPECT_EQ(refusal(file.path(), true), "accepted");
  EXPECT_THAT(refusal(file.path()), HasSubstr("in use"));
}

}  // namespace
}  // namespace anykvm::vmm
