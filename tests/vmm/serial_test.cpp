// The 16550A as Linux's 8250 driver probes and uses it.
#include "vmm/serial.h"

#include <gtest/gtest.h>

#include <string>

#include "vmm/console.h"
#include "vmm/recording_irq_line.h"

namespace anykvm::vmm {
namespace {

struct SerialTest : ::testing::Test {
  RecordingIrqLine irq;
  std::string sent;
  Serial16550 serial{irq, [this](u8 byte) { sent.push_back(char(byte)); }};

  u8 in(u64 offset) {
    u8 value[1] = {0xff};
    serial.read(offset, value);
    return value[0];
  }
  void out(u64 offset, u8 value) { serial.write(offset, {&value, 1}); }
  void receive(std::string_view text) { serial.receive({reinterpret_cast<const u8*>(text.data()), text.size()}); }
  void ready() { out(4, 0x0b); }  // DTR, RTS, OUT2
};

TEST_F(SerialTest, SendsAndIsAlwaysEmpty) {
  EXPECT_EQ(in(5), 0x60);
  out(0, 'h');
  out(0, 'i');
  EXPECT_EQ(sent, "hi");
  EXPECT_EQ(in(5), 0x60);
}

TEST_F(SerialTest, ProbesAs16550A) {
  out(7, 0x5a);
  EXPECT_EQ(in(7), 0x5a) << "a scratch register: no 8250";
  out(1, 0xff);
  EXPECT_EQ(in(1), 0x0f) << "no more interrupts than four: no XScale";
  out(1, 0);
  out(4, 0x1a);  // loopback, RTS, OUT2
  EXPECT_EQ(in(6) & 0xf0, 0x90) << "CTS and DCD";
  out(4, 0);
  out(2, 1);
  EXPECT_EQ(in(2) & 0xc0, 0xc0) << "working FIFOs";
  out(2, 0x21);
  EXPECT_EQ(in(2) & 0x20, 0) << "of 16 bytes, not 64";
}

TEST_F(SerialTest, DivisorLatchHidesData) {
  out(3, 0x83);
  out(0, 0x34);
  out(1, 0x12);
  EXPECT_EQ(in(0), 0x34);
  EXPECT_EQ(in(1), 0x12);
  out(3, 0x03);
  EXPECT_TRUE(sent.empty());
  EXPECT_EQ(in(1), 0);
}

TEST_F(SerialTest, LoopbackReturnsBytesAndClosesTheInterruptGate) {
  out(1, 1);
  out(4, 0x18);
  out(0, 'x');
  EXPECT_TRUE(sent.empty());
  EXPECT_EQ(in(5) & 1, 1);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(in(0), 'x');
}

TEST_F(SerialTest, TransmitInterruptIsRaisedByEnablingItAndLoweredByReadingIt) {
  ready();
  out(1, 2);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(2) & 0x0f, 2);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(in(2) & 0x0f, 1);
  out(0, 'x');
  EXPECT_TRUE(irq.level);
}

TEST_F(SerialTest, ReceiveInterruptFollowsTheFifo) {
  ready();
  out(2, 0x81);  // FIFO, trigger at 8
  out(1, 1);
  receive("abc");
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(2) & 0x0f, 0x0c) << "below the trigger level: time-out";
  receive("defgh");
  EXPECT_EQ(in(2) & 0x0f, 0x04);
  std::string read;
  while (in(5) & 1) read.push_back(char(in(0)));
  EXPECT_EQ(read, "abcdefgh");
  EXPECT_FALSE(irq.level);
}

TEST_F(SerialTest, NothingIsLostBeforeTheDriverIsUp) {
  unsigned drained = 0;
  serial.on_drained([&] { ++drained; });
  std::string text(40, 'x');
  text += "end";
  receive(text);
  EXPECT_EQ(in(5) & 1, 0) << "RTS is low";
  out(2, 7);  // the driver clears the FIFOs
  ready();
  std::string read;
  while (in(5) & 1) read.push_back(char(in(0)));
  EXPECT_EQ(read, text);
  EXPECT_EQ(drained, 1u);
}

TEST(EscapeKeys, LeaveHelpAndTheKeyItself) {
  using Command = EscapeKeys::Command;
  EscapeKeys keys;
  std::vector<u8> guest;
  EXPECT_EQ(keys.feed('x', guest), Command::none);
  EXPECT_EQ(keys.feed(1, guest), Command::none);
  EXPECT_EQ(keys.feed('h', guest), Command::help);
  EXPECT_EQ(keys.feed(1, guest), Command::none);
  EXPECT_EQ(keys.feed(1, guest), Command::none);
  EXPECT_EQ(keys.feed(1, guest), Command::none);
  EXPECT_EQ(keys.feed('q', guest), Command::none);
  EXPECT_EQ(guest, (std::vector<u8>{'x', 1, 1, 'q'}));
  keys.feed(1, guest);
  EXPECT_EQ(keys.feed('x', guest), Command::leave);
}

}  // namespace
}  // namespace anykvm::vmm
