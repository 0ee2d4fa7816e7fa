// The guest that tests run in: where its parts lie in guest memory, and what it leaves behind. Shared with monitor.S.
//
// The monitor runs one test after another. For each it restores its tables (GDT, LDT, IDT, task state segments,
// stacks), applies the test's patches, and enters the test's code with IRET. Whatever exception or interrupt ends the
// test lands in the monitor, which writes a log entry. All of it is guest code, so that any machine can run it; two
// machines agree when their memories do.
#pragma once

#define MONITOR_BOOT 0x1000  // real mode starts here
#define MONITOR_CODE 0x2000
#define MONITOR_TABLES 0x8000  // restored before each test, up to the end of the test's code page
#define MONITOR_TABLES_SIZE 0x5000
#define MONITOR_GDT 0x8000
#define MONITOR_GDT_SIZE 0x100
#define MONITOR_LDT 0x8200
#define MONITOR_IDT 0x8400
#define MONITOR_IDT_SIZE 0x2a0  // 0x54 gates
#define MONITOR_TSS 0x8800      // of the tests; 0x100 apart: the double fault's, another 32-bit one, a 16-bit one
#define MONITOR_TSS_DF 0x8900
#define MONITOR_TSS_A 0x8a00
#define MONITOR_TSS_B 0x8b00
#define MONITOR_STACK 0xb000  // of the monitor, growing down
#define MONITOR_TEST_CODE 0xc000
#define MONITOR_PRISTINE 0x10000
#define MONITOR_TESTS 0x100000
#define MONITOR_TEST_SIZE 0x200
#define MONITOR_LOG 0x400000
#define MONITOR_LOG_SIZE 0x800
#define MONITOR_COUNT 0x1ff0  // number of tests
#define MONITOR_EXIT_PORT 0xf4

// A test: offsets.
#define TEST_GPR 0x00       // eax, ecx, edx, ebx, ebp, esi, edi
#define TEST_SEGMENTS 0x20  // ds, es, fs, gs
#define TEST_FRAME 0x30     // eip, cs, eflags, esp, ss; in virtual-8086 mode es, ds, fs, gs
#define TEST_CR4 0x54
#define TEST_PATCHES 0x58  // how many
#define TEST_CR0 0x5c
#define TEST_PATCH 0x60  // address, value
#define TEST_EFER 0xe0
#define TEST_CR3 0xe4
#define TEST_CODE 0x100
#define TEST_CODE_SIZE 0x100

#define MONITOR_VECTORS 0x54

// Tests of paging: the first 4 MiB are mapped one to one, and the window, from 8 MiB on, by entries that tests change.
#define PAGING_PD 0x20000
#define PAGING_PT 0x21000
#define PAGING_WINDOW_PT 0x22000
#define PAGING_PAE_PDPT 0x23000
#define PAGING_PAE_PD 0x24000
#define PAGING_PAE_PT 0x25000  // two
#define PAGING_PAE_WINDOW_PT 0x27000
#define PAGING_FRAMES 0x30000  // four pages
#define PAGING_WINDOW 0x800000
#define LOG_PAGING 0x5c0  // PDEs 2-3, 8 PTEs, 2 PAE PDEs, 8 PAE PTEs, two words of each frame
