// The guest that tests of long mode run in: where its parts lie, what a test is, what it leaves behind. Shared with
// long_monitor.S. As monitor.h's, it restores its tables before each test and logs whatever event ends it.
//
// The first 2 MiB are mapped one to one by 4 KiB pages, and the window, from 1 << 39 on, by tables that tests change.
#pragma once

#define LONG_BOOT 0x1000  // real mode starts here
#define LONG_CODE 0x2000
#define LONG_STACK 0x8000  // of the monitor, growing down
#define LONG_IST1 0x9000   // of the handlers of all events but tests' own
#define LONG_IST2 0xa000   // of the double fault's
#define LONG_COUNT 0x1fe0  // number of tests
#define LONG_CR4 0x1fe8    // of the monitor
#define LONG_CR3 0x1ff0
#define LONG_TABLES 0x10000  // restored before each test
#define LONG_TABLES_SIZE 0x14000
#define LONG_GDT 0x10000
#define LONG_GDT_LIMIT 0x17f
#define LONG_LDT 0x10200
#define LONG_TSS 0x10300
#define LONG_TSS2 0x10380
#define LONG_IDT 0x10400
#define LONG_VECTORS 0x60
#define LONG_PML5 0x11000
#define LONG_PML4 0x12000
#define LONG_PDPT 0x13000
#define LONG_PD 0x14000
#define LONG_PT 0x15000
#define LONG_WINDOW_PDPT 0x16000
#define LONG_WINDOW_PD 0x17000
#define LONG_WINDOW_PT 0x18000
#define LONG_WINDOW_PT2 0x19000
#define LONG_USER_CODE 0x1a000
#define LONG_SUPER_CODE 0x1b000
#define LONG_USER_STACK 0x1c800  // growing down; above it, data
#define LONG_RSP0 0x1d400
#define LONG_IST3 0x1d800  // of tests' gates
#define LONG_RSP1 0x1dc00
#define LONG_SUPER_DATA 0x1e000
#define LONG_FRAMES 0x20000  // four pages for the window
#define LONG_PRISTINE 0x40000
#define LONG_MSRS 0x60000  // count, then pairs: what they hold at the start of a test
#define LONG_TESTS 0x100000
#define LONG_TEST_SIZE 0x400
#define LONG_LOG 0x400000
#define LONG_LOG_SIZE 0x600
#define LONG_EXIT_PORT 0xf4
#define LONG_APIC_ICR 0x80fee00300  // of the local APIC, in the window

// A test: offsets.
#define LONG_TEST_GPR 0x00       // 16, by number
#define LONG_TEST_FRAME 0x80     // rip, cs, rflags, rsp, ss
#define LONG_TEST_SEGMENTS 0xa8  // ds, es, fs, gs
#define LONG_TEST_CR0 0xc8
#define LONG_TEST_CR4 0xd0
#define LONG_TEST_DR 0xd8  // 0-3
#define LONG_TEST_DR7 0xf8
#define LONG_TEST_PKRU 0x100
#define LONG_TEST_MSRS 0x108     // count, then pairs
#define LONG_TEST_PATCHES 0x170  // count, then address and value, 64 bits each
#define LONG_TEST_CODE 0x300
#define LONG_TEST_CODE_SIZE 0x100

// A log entry: offsets. Words of 64 bits.
#define LONG_LOG_GPR 0x008  // 15, without RSP
#define LONG_LOG_VECTOR 0x080
#define LONG_LOG_FRAME 0x088  // 8
#define LONG_LOG_RSP 0x0c8
#define LONG_LOG_MSRS 0x128  // 10
#define LONG_LOG_SEGMENTS 0x178
#define LONG_LOG_COPIES 0x1d0
