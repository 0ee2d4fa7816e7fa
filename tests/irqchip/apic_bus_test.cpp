// Who gets an interrupt: delivery modes, destinations and shorthands over several APICs.
#include "irqchip/apic_bus.h"

#include <gtest/gtest.h>

#include <bit>
#include <thread>

#include "irqchip/fake_apic_client.h"

namespace anykvm::irqchip {
namespace {

using namespace test;

constexpr u32 icr_logical = 1 << 11, icr_assert = 1 << 14, icr_level = 1 << 15;
constexpr u32 to_self = 1 << 18, to_all = 2 << 18, to_others = 3 << 18;
constexpr u32 msr_icr = 0x830;

void send_ipi(LocalApic& from, u32 destination, u32 icr_low) {
  write(from, reg::icr_high, destination << 24);
  write(from, reg::icr, icr_low);
}

TEST(ApicBus, PhysicalDestinations) {
  FakeMachine machine(4);
  send_ipi(machine[0], 2, icr_assert | 0x40);
  EXPECT_EQ(machine.takers(0x40), 1u << 2);
  send_ipi(machine[0], 0xff, icr_assert | 0x41);
  EXPECT_EQ(machine.takers(0x41), 0xfu);
  EXPECT_EQ(machine.bus.send({.destination = 3, .vector = 0x42}), 1);
  EXPECT_EQ(machine.bus.send({.destination = 9, .vector = 0x42}), 0);
  EXPECT_EQ(machine.bus.send({.destination = 0xff, .vector = 0x43}), 4);
}

TEST(ApicBus, Shorthands) {
  FakeMachine machine(4);
  send_ipi(machine[1], 0, to_self | icr_assert | 0x50);
  EXPECT_EQ(machine.takers(0x50), 1u << 1);
  send_ipi(machine[1], 0, to_all | icr_assert | 0x51);
  EXPECT_EQ(machine.takers(0x51), 0xfu);
  send_ipi(machine[1], 0, to_others | icr_assert | 0x52);
  EXPECT_EQ(machine.takers(0x52), 0xdu);
}

TEST(ApicBus, FlatLogicalDestinations) {
  FakeMachine machine(8);
  send_ipi(machine[0], 0b10100100, icr_logical | icr_assert | 0x40);
  EXPECT_EQ(machine.takers(0x40), 0b10100100u);
  send_ipi(machine[0], 0xff, icr_logical | icr_assert | 0x41);
  EXPECT_EQ(machine.takers(0x41), 0xffu);
}

TEST(ApicBus, ClusterLogicalDestinations) {
  FakeMachine machine(8);
  for (u32 cpu = 0; cpu < 8; ++cpu) {
    write(machine[cpu], reg::dfr, 0x0fffffff);
    write(machine[cpu], reg::ldr, (cpu / 4) << 28 | 1u << (24 + cpu % 4));
  }
  send_ipi(machine[0], 0x15, icr_logical | icr_assert | 0x40);
  EXPECT_EQ(machine.takers(0x40), 0x50u);
  send_ipi(machine[0], 0x0f, icr_logical | icr_assert | 0x41);
  EXPECT_EQ(machine.takers(0x41), 0x0fu);
  send_ipi(machine[0], 0xff, icr_logical | icr_assert | 0x42);
  EXPECT_EQ(machine.takers(0x42), 0xffu);
}

TEST(ApicBus, X2apicDestinations) {
  FakeMachine machine(20);
  machine.enter_x2apic();
  const auto send = [&](u64 destination, u32 low) {
    EXPECT_EQ(machine[0].write_msr(msr_icr, destination << 32 | low), LocalApic::MsrResult::ok);
  };
  const auto takers = [&](u8 vector) {
    u32 mask = 0;
    for (unsigned cpu = 0; cpu < machine.apics.size(); ++cpu)
      if (machine[cpu].acknowledge() == vector) {
        mask |= 1u << cpu;
        machine[cpu].write_msr(0x80b, 0);
      }
    return mask;
  };
  send(17, icr_assert | 0x40);
  EXPECT_EQ(takers(0x40), 1u << 17);
  send(0xffffffff, icr_assert | 0x41);
  EXPECT_EQ(takers(0x41), 0xfffffu);
  send(0xff, icr_assert | 0x42);
  EXPECT_EQ(takers(0x42), 0u) << "0xff is an ID, not the broadcast";
  send(0x1'000a, icr_logical | icr_assert | 0x43);
  EXPECT_EQ(takers(0x43), 1u << 17 | 1u << 19);
  send(0x0'8001, icr_logical | icr_assert | 0x44);
  EXPECT_EQ(takers(0x44), 1u << 15 | 1u);
  EXPECT_EQ(machine.bus.send({.destination = 0xff, .vector = 0x45}), 20) << "but to the I/O APIC it is";
  takers(0x45);
  machine.bus.disable_broadcast_quirk();
  EXPECT_LE(machine.bus.send({.destination = 0xff, .vector = 0x46}), 0);
}

TEST(ApicBus, LowestPriorityPicksOneOfTheEnabled) {
  FakeMachine machine(4);
  u32 seen = 0;
  for (u8 vector = 0x40; vector < 0x50; ++vector) {
    EXPECT_EQ(machine.bus.send(
                  {.destination = 0x0f, .vector = vector, .mode = DeliveryMode::lowest_priority, .logical = true}),
              1);
    const u32 taker = machine.takers(vector);
    EXPECT_EQ(std::popcount(taker), 1);
    seen |= taker;
  }
  EXPECT_EQ(seen, 0xfu) << "spread over all";
  write(machine[2], reg::svr, 0xff);
  for (u8 vector = 0x40; vector < 0x50; ++vector) {
    EXPECT_EQ(machine.bus.send({.destination = 0x0c, .vector = vector, .logical = true, .redirect_hint = true}), 1);
    EXPECT_EQ(machine.takers(vector), 1u << 3);
  }
  EXPECT_EQ(
      machine.bus.send({.destination = 0x04, .vector = 0x40, .mode = DeliveryMode::lowest_priority, .logical = true}),
      -1);
}

TEST(ApicBus, OtherDeliveryModes) {
  FakeMachine machine(2);
  FakeApicClient& target = *machine.clients[1];
  send_ipi(machine[0], 1, icr_assert | 0x400);
  EXPECT_EQ(target.nmis, 1);
  send_ipi(machine[0], 1, icr_assert | 0x200);
  EXPECT_EQ(target.smis, 1);
  send_ipi(machine[0], 1, icr_assert | icr_level | 0x500);
  EXPECT_EQ(target.inits, 1);
  send_ipi(machine[0], 1, icr_level | 0x500);  // the level de-assert of old
  EXPECT_EQ(target.inits, 1);
  send_ipi(machine[0], 1, icr_assert | 0x69a);
  EXPECT_EQ(target.sipis, 1);
  EXPECT_EQ(target.sipi_vector, 0x9a);
  EXPECT_EQ(machine.bus.send({.destination = 1, .mode = DeliveryMode::remote_read}), 1);
  EXPECT_EQ(target.unhalts, 1);
  EXPECT_EQ(machine.bus.send({.destination = 1, .vector = 0x40, .mode = DeliveryMode::ext_int}), 0);
  EXPECT_EQ(machine[1].pending(), -1);
  EXPECT_EQ(machine.clients[0]->nmis, 0);
  EXPECT_EQ(read(machine[0], reg::icr), icr_assert | 0x69au) << "the delivery status bit is never seen set";
}

TEST(ApicBus, InitAndSipiReachAnApicThatIsDisabledBySoftware) {
  FakeMachine machine(2);
  write(machine[1], reg::svr, 0xff);
  send_ipi(machine[0], 0, to_others | icr_assert | 0x500);
  EXPECT_EQ(machine.clients[1]->inits, 1);
  EXPECT_EQ(machine.bus.send({.destination = 1, .vector = 0x40}), 0);
}

TEST(ApicBus, ChangedXapicIdIsFollowed) {
  FakeMachine machine(3);
  write(machine[1], reg::id, 7u << 24);
  EXPECT_EQ(machine.bus.send({.destination = 7, .vector = 0x40}), 1);
  EXPECT_EQ(machine.takers(0x40), 1u << 1);
  EXPECT_LE(machine.bus.send({.destination = 1, .vector = 0x40}), 0);
  write(machine[1], reg::id, 1u << 24);
  EXPECT_EQ(machine.bus.send({.destination = 1, .vector = 0x40}), 1);
}

TEST(ApicBus, HardwareDisabledApicHearsNothing) {
  FakeMachine machine(2);
  EXPECT_EQ(machine[1].set_base(0xfee00000), 0);
  EXPECT_EQ(machine.bus.send({.destination = 1, .mode = DeliveryMode::nmi}), 0);
  EXPECT_EQ(machine.clients[1]->nmis, 0);
}

TEST(ApicBus, NobodyListens) {
  ApicBus bus;
  EXPECT_EQ(bus.send({.destination = 0xff, .vector = 0x40}), -1);
}

TEST(ApicBus, PicOutputWakesWhoTakesIt) {
  FakeMachine machine(2);
  for (auto& client : machine.clients) client->wakes = 0;
  machine.bus.wake_pic_taker();
  EXPECT_EQ(machine.clients[0]->wakes, 1);
  EXPECT_EQ(machine.clients[1]->wakes, 0);
  write(machine[1], reg::lvt_lint0, 0x400);
  machine.bus.pulse_lint0_nmi();
  EXPECT_EQ(machine.clients[0]->nmis, 0);
  EXPECT_EQ(machine.clients[1]->nmis, 1);
}

TEST(ApicBus, ApicsComeAndGoWhileOthersSend) {
  FakeMachine machine(2);
  std::atomic<bool> stop{false};
  std::thread sender([&] {
    while (!stop) machine.bus.send({.vector = 0x40, .shorthand = Shorthand::all});
  });
  for (int i = 0; i < 200; ++i) {
    FakeApicClient client;
    LocalApic guest(5, client, machine.bus, machine.timers, false);
    write(guest, reg::svr, 0x1ff);
    EXPECT_EQ(machine.bus.find(5), &guest);
  }
  stop = true;
  sender.join();
  EXPECT_EQ(machine.bus.find(5), nullptr);
}

TEST(ApicBus, ConcurrentSendersLoseNothing) {
  FakeMachine machine(1);
  LocalApic& apic = machine[0];
  constexpr int rounds = 300;
  std::atomic<int> taken[4] = {};
  std::atomic<bool> done{false};
  std::vector<std::thread> senders;
  for (int s = 0; s < 4; ++s)
    senders.emplace_back([&, s] {
      for (int i = 0; i < rounds; ++i) {
        const int before = taken[s];
        machine.bus.send({.vector = static_cast<u8>(0x40 + s)});  // all four share a word of the IRR
        while (taken[s] == before) std::this_thread::yield();
      }
    });
  std::thread vcpu([&] {
    while (!done)
      for (int vector : take_all(apic)) ++taken[vector - 0x40];
  });
  for (std::thread& sender : senders) sender.join();
  done = true;
  vcpu.join();
  for (auto& count : taken) EXPECT_EQ(count, rounds);
}

}  // namespace
}  // namespace anykvm::irqchip
