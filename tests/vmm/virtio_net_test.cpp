// virtio-net over the user network: ARP, DHCP and a TCP connection to a server on the host's loopback, frame by frame.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <net/ethernet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "virtio_driver.h"
#include "vmm/virtio/devices.h"
#include "vmm/virtio/linux_virtio_net.h"
#include "vmm/virtio/net.h"

namespace anykvm::vmm {
namespace {

using Frame = std::vector<u8>;
constexpr u8 guest_mac[6] = {0x52, 0x54, 0x00, 0x12, 0x34, 0x56};
constexpr u32 header_size = 12, buffer_size = 2048;
constexpr Gpa transmit_at = FakeDriver::buffers + 0x100000;

/// A guest's network card driver: a buffer in every receive descriptor, one frame sent at a time.
class Nic {
 public:
  explicit Nic(FakeDriver& driver) : driver_(driver) { restart(); }

  void restart() {
    driver_.start(2);
    received_ = sent_ = 0;
    for (u16 i = 0; i < FakeDriver::queue_size; ++i) {
      driver_.queue(0).descriptor(i, FakeDriver::buffers + i * buffer_size, buffer_size, VRING_DESC_F_WRITE);
      driver_.queue(0).offer(i);
    }
    driver_.notify(0);
  }
  void send(const Frame& frame) {
    std::ranges::fill(driver_.bytes(transmit_at, header_size), u8{0});
    driver_.memory().write(transmit_at + header_size, frame);
    driver_.queue(1).descriptor(0, transmit_at, header_size, VRING_DESC_F_NEXT, 1);
    driver_.queue(1).descriptor(1, transmit_at + header_size, static_cast<u32>(frame.size()));
    driver_.queue(1).offer(0);
    driver_.notify(1);
    EXPECT_TRUE(driver_.completed(1, ++sent_));
  }
  /// The next frame for the guest, empty when none comes.
  Frame receive() {
    FakeQueue& queue = driver_.queue(0);
    if (!FakeDriver::eventually([&] { return queue.used_index() != received_; })) return {};
    const auto used = queue.used(received_++);
    const Gpa at = FakeDriver::buffers + used.id * buffer_size;
    EXPECT_GT(used.len, header_size);
    EXPECT_LE(used.len, buffer_size);
    const auto header = queue.get<virtio_net_hdr_v1>(at);
    EXPECT_EQ(header.num_buffers, 1);
    EXPECT_EQ(header.flags, VIRTIO_NET_HDR_F_DATA_VALID);
    const auto bytes = driver_.bytes(at + header_size, used.len - header_size);
    Frame frame(bytes.begin(), bytes.end());
    queue.offer(static_cast<u16>(used.id));
    driver_.notify(0);
    return frame;
  }
  bool nothing_received() { return driver_.queue(0).used_index() == received_; }

 private:
  FakeDriver& driver_;
  u16 received_ = 0, sent_ = 0;
};

void append(Frame& frame, const auto& value) {
  const auto* bytes = reinterpret_cast<const u8*>(&value);
  frame.insert(frame.end(), bytes, bytes + sizeof(value));
}
Frame ethernet(u16 type, const u8* to) {
  Frame frame(to, to + 6);
  frame.insert(frame.end(), guest_mac, guest_mac + 6);
  append(frame, htons(type));
  return frame;
}
constexpr u8 everyone[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

u16 checksum(std::span<const u8> bytes, u32 sum = 0) {
  for (size_t i = 0; i < bytes.size(); ++i) sum += i % 2 ? bytes[i] : bytes[i] << 8;
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return htons(static_cast<u16>(~sum));
}

Frame arp_request(const char* from, const char* for_whom) {
  Frame frame = ethernet(ETHERTYPE_ARP, everyone);
  const u8 fixed[] = {0, 1, 8, 0, 6, 4, 0, 1};
  append(frame, fixed);
  append(frame, guest_mac);
  append(frame, inet_addr(from));
  frame.insert(frame.end(), 6, 0);
  append(frame, inet_addr(for_whom));
  return frame;
}

Frame ip_packet(u8 protocol, const char* from, const char* to, const Frame& payload, const u8* mac) {
  Frame frame = ethernet(ETHERTYPE_IP, mac);
  iphdr ip{};
  ip.version = 4, ip.ihl = 5, ip.ttl = 64, ip.protocol = protocol;
  ip.tot_len = htons(static_cast<u16>(sizeof(ip) + payload.size()));
  ip.saddr = inet_addr(from), ip.daddr = inet_addr(to);
  ip.check = checksum({reinterpret_cast<const u8*>(&ip), sizeof(ip)});
  append(frame, ip);
  frame.insert(frame.end(), payload.begin(), payload.end());
  return frame;
}

TEST(VirtioNetTest, TheHostAnswersArp) {
  FakeDriver driver([](EventLoop& loop) { return make_user_net(loop); });
  Nic nic(driver);
  EXPECT_EQ(driver.reg(VIRTIO_MMIO_CONFIG), 0x12005452u) << "the MAC address";
  nic.send(arp_request("10.0.2.15", "10.0.2.2"));
  const Frame answer = nic.receive();
  ASSERT_GE(answer.size(), 42u);
  EXPECT_EQ(answer[21], 2) << "a reply";
  EXPECT_EQ((std::vector<u8>(answer.begin() + 28, answer.begin() + 32)), (std::vector<u8>{10, 0, 2, 2}));
  EXPECT_TRUE(FakeDriver::eventually([&] { return driver.irq().level.load(); }));
}

TEST(VirtioNetTest, OffersAnAddressByDhcp) {
  FakeDriver driver([](EventLoop& loop) { return make_user_net(loop); });
  Nic nic(driver);
  Frame bootp(236);
  bootp[0] = 1, bootp[1] = 1, bootp[2] = 6;
  std::ranges::copy(guest_mac, bootp.begin() + 28);
  const u8 options[] = {0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255};  // cookie, DHCPDISCOVER, end
  append(bootp, options);
  bootp.resize(548);
  Frame udp;
  append(udp, udphdr{{{htons(68), htons(67), htons(static_cast<u16>(8 + bootp.size())), 0}}});
  udp.insert(udp.end(), bootp.begin(), bootp.end());
  nic.send(ip_packet(IPPROTO_UDP, "0.0.0.0", "255.255.255.255", udp, everyone));
  const Frame offer = nic.receive();
  ASSERT_GE(offer.size(), 14u + 20 + 8 + 240);
  const u8* answer = &offer[14 + 20 + 8];
  EXPECT_EQ((std::vector<u8>(answer + 16, answer + 20)), (std::vector<u8>{10, 0, 2, 15})) << "your address";
}

/// The guest's end of one TCP connection.
class TcpPeer {
 public:
  TcpPeer(Nic& nic, u16 port) : nic_(nic), port_(port) {
    nic_.send(arp_request("10.0.2.15", "10.0.2.2"));
    const Frame answer = nic_.receive();
    if (answer.size() >= 12) std::copy_n(answer.begin() + 6, 6, host_mac_);
  }
  void send(u8 flags, std::string_view text = {}) {
    tcphdr tcp{};
    tcp.source = htons(4000), tcp.dest = htons(port_);
    tcp.seq = htonl(sequence_), tcp.ack_seq = htonl(acknowledged_);
    tcp.doff = 5, tcp.window = htons(60000);
    tcp.th_flags = flags;
    Frame segment, pseudo;
    append(segment, tcp);
    segment.insert(segment.end(), text.begin(), text.end());
    append(pseudo, inet_addr("10.0.2.15"));
    append(pseudo, inet_addr("10.0.2.2"));
    append(pseudo, htons(IPPROTO_TCP));
    append(pseudo, htons(static_cast<u16>(segment.size())));
    pseudo.insert(pseudo.end(), segment.begin(), segment.end());
    const u16 sum = checksum(pseudo);
    std::memcpy(&segment[16], &sum, 2);
    nic_.send(ip_packet(IPPROTO_TCP, "10.0.2.15", "10.0.2.2", segment, host_mac_));
    sequence_ += static_cast<u32>(text.size()) + ((flags & TH_SYN) ? 1 : 0);
  }
  /// Takes segments until one has text, or the flag; returns the text.
  std::string receive_until(u8 flag) {
    for (int i = 0; i < 20; ++i) {
      const Frame frame = nic_.receive();
      if (frame.empty()) break;
      if (frame.size() < 14 + 40 || frame[12] != 8 || frame[13] != 0 || frame[23] != IPPROTO_TCP) continue;
      iphdr ip;
      tcphdr tcp;
      std::memcpy(&ip, &frame[14], sizeof(ip));
      std::memcpy(&tcp, &frame[34], sizeof(tcp));
      const size_t begin = 34 + tcp.doff * 4u, end = 14u + ntohs(ip.tot_len);
      const std::string text(frame.begin() + static_cast<std::ptrdiff_t>(begin),
                             frame.begin() + static_cast<std::ptrdiff_t>(end));
      acknowledged_ = ntohl(tcp.seq) + static_cast<u32>(text.size()) + ((tcp.th_flags & (TH_SYN | TH_FIN)) ? 1 : 0);
      flags_ = tcp.th_flags;
      if (!text.empty() || (tcp.th_flags & flag)) return text;
    }
    return "nothing";
  }
  u8 flags() const { return flags_; }

 private:
  Nic& nic_;
  u16 port_;
  u8 host_mac_[6] = {};
  u32 sequence_ = 1000, acknowledged_ = 0;
  u8 flags_ = 0;
};

TEST(VirtioNetTest, ReachesAServerOnTheHostsLoopback) {
  const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  ASSERT_EQ(bind(server, reinterpret_cast<sockaddr*>(&address), length), 0);
  ASSERT_EQ(listen(server, 1), 0);
  ASSERT_EQ(getsockname(server, reinterpret_cast<sockaddr*>(&address), &length), 0);
  std::thread host([server] {
    const int peer = accept(server, nullptr, nullptr);
    char text[16] = {};
    const ssize_t got = recv(peer, text, sizeof(text), 0);
    const std::string answer = "got " + std::string(text, got > 0 ? static_cast<size_t>(got) : 0);
    EXPECT_EQ(::send(peer, answer.data(), answer.size(), 0), static_cast<ssize_t>(answer.size()));
    close(peer);
  });

  FakeDriver driver([](EventLoop& loop) { return make_user_net(loop); });
  Nic nic(driver);
  TcpPeer guest(nic, ntohs(address.sin_port));
  guest.send(TH_SYN);
  EXPECT_EQ(guest.receive_until(TH_SYN), "");
  EXPECT_EQ(guest.flags(), TH_SYN | TH_ACK);
  guest.send(TH_ACK);
  guest.send(TH_ACK | TH_PUSH, "hello");
  EXPECT_EQ(guest.receive_until(TH_FIN), "got hello");
  guest.send(TH_ACK);
  shutdown(server, SHUT_RDWR);  // ends accept(), should the guest never have come
  host.join();
  close(server);
}

/// A network in the test's hand.
struct Loopback final : NetBackend {
  void send(std::span<const u8> frame) override {
    frames.emplace_back(frame.begin(), frame.end());
    if (echo) receiver_(frame);
  }
  void inject(size_t size) { receiver_(Frame(size, 0x11)); }
  std::vector<Frame> frames;
  bool echo = true;
};

class VirtioNetQueueTest : public testing::Test {
 protected:
  EventLoop* loop_ = nullptr;
  Loopback* network_ = nullptr;
  FakeDriver driver_{[this](EventLoop& loop) {
    loop_ = &loop;
    auto network = std::make_unique<Loopback>();
    network_ = network.get();
    return std::make_unique<NetDevice>(loop, std::move(network), guest_mac);
  }};
};

TEST_F(VirtioNetQueueTest, EchoesInOrder) {
  Nic nic(driver_);
  for (u8 i = 0; i < 100; ++i) {
    const Frame frame(60 + i, i);
    nic.send(frame);
    ASSERT_EQ(nic.receive(), frame);
  }
}

TEST_F(VirtioNetQueueTest, FramesWaitForBuffersAndAreDroppedWhenTooMany) {
  driver_.start(2);
  std::atomic<bool> done{false};
  loop_->post([&] {
    for (int i = 0; i < 2000; ++i) network_->inject(100);
    done = true;
  });
  ASSERT_TRUE(FakeDriver::eventually([&] { return done.load(); }));
  EXPECT_EQ(driver_.queue(0).used_index(), 0);
  unsigned received = 0;
  for (; received < 2000; ++received) {
    driver_.queue(0).descriptor(0, FakeDriver::buffers, buffer_size, VRING_DESC_F_WRITE);
    driver_.queue(0).offer(0);
    driver_.notify(0);
    const u16 expected = static_cast<u16>(received + 1);
    bool came = false;
    for (int i = 0; i < 200 && !came; ++i) {
      came = driver_.queue(0).used_index() == expected;
      if (!came) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!came) break;
  }
  EXPECT_EQ(received, 512u);
}

TEST_F(VirtioNetQueueTest, ResetDropsWhatWaited) {
  driver_.start(2);
  std::atomic<bool> done{false};
  loop_->post([&] {
    network_->inject(100);
    done = true;
  });
  ASSERT_TRUE(FakeDriver::eventually([&] { return done.load(); }));
  Nic nic(driver_);
  const Frame frame(64, 9);
  nic.send(frame);
  EXPECT_EQ(nic.receive(), frame);
}

TEST_F(VirtioNetQueueTest, ImpossibleFramesAreDropped) {
  Nic nic(driver_);
  nic.send({});  // the header alone
  FakeQueue& queue = driver_.queue(1);
  queue.descriptor(0, 0, 200000);
  queue.offer(0);
  queue.descriptor(1, 0, 3);  // not even a header
  queue.offer(1);
  queue.descriptor(2, 0, 100, VRING_DESC_F_WRITE);
  queue.offer(2);
  driver_.notify(1);
  EXPECT_TRUE(driver_.completed(1, 4));
  EXPECT_TRUE(nic.nothing_received());
  EXPECT_FALSE(driver_.needs_reset());
}

TEST_F(VirtioNetQueueTest, BufferTooSmallLosesTheFrame) {
  driver_.start(2);
  driver_.queue(0).descriptor(0, FakeDriver::buffers, 20, VRING_DESC_F_WRITE);
  driver_.queue(0).offer(0);
  loop_->post([&] { network_->inject(100); });
  ASSERT_TRUE(driver_.completed(0, 1));
  EXPECT_EQ(driver_.queue(0).used(0).len, 0u);
}

}  // namespace
}  // namespace anykvm::vmm
