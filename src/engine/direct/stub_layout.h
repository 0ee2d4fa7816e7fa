// What the vCPU's thread and a process that runs guest user code natively (stub.S) know of each other: an area of the
// same layout in both, the process' at a fixed address where guests seldom have anything.
#pragma once

// Offsets in the area, in bytes; also for the assembler.
#define STUB_CODE_SIZE 0x1000
#define STUB_COMMANDS 0x1000 /* read-only to the process */
#define STUB_COMMANDS_SIZE 0x10000
#define STUB_BLOCK 0x11000
#define STUB_BLOCK_SIZE 0x8000
#define STUB_AREA_SIZE 0x19000
// Commands: what they begin with, and the system calls to make.
#define STUB_COMMANDS_SEQUENCE 0
#define STUB_COMMANDS_COUNT 4
#define STUB_COMMANDS_THEN_GO 8
#define STUB_CALLS 1024
#define STUB_CALL_SIZE 64
// Block.
#define STUB_BLOCK_STOPS 0
#define STUB_BLOCK_GO 4
#define STUB_BLOCK_DONE 8
#define STUB_BLOCK_SIGNAL 12
#define STUB_BLOCK_FS_BASE 16
#define STUB_BLOCK_GS_BASE 24
#define STUB_BLOCK_CONTEXT 32
#define STUB_BLOCK_ERROR 40
#define STUB_BLOCK_PROCESS 48
#define STUB_BLOCK_RUNNER 52
#define STUB_BLOCK_CALL_ADDRESS 56
#define STUB_BLOCK_SCRATCH 64
#define STUB_BLOCK_CPU 72

#ifndef __ASSEMBLER__
#include <cstddef>

#include "x86/types.h"

namespace anykvm::engine::direct {

/// Where the area lies in the process: between the programs that are loaded high and the region of mappings.
inline constexpr u64 area_address = 0x6b1d4a300000;

struct SystemCall {
  s64 number;
  u64 arguments[6];
  u64 unused = 0;
};
static_assert(sizeof(SystemCall) == STUB_CALL_SIZE);

struct Commands {
  static constexpr unsigned most = (STUB_COMMANDS_SIZE - STUB_CALLS) / STUB_CALL_SIZE;

  u32 sequence;  ///< futex: grows when there are calls to make
  u32 count;
  u32 then_go;  ///< behind them the runner goes on
  u32 unused[13];
  u8 data[STUB_CALLS - 64];  ///< what the calls point to
  SystemCall calls[most];
};
static_assert(offsetof(Commands, sequence) == STUB_COMMANDS_SEQUENCE &&
              offsetof(Commands, count) == STUB_COMMANDS_COUNT &&
              offsetof(Commands, then_go) == STUB_COMMANDS_THEN_GO && offsetof(Commands, calls) == STUB_CALLS &&
              sizeof(Commands) == STUB_COMMANDS_SIZE);

/// Guest code can reach it: nothing in it is to be trusted.
struct StubBlock {
  u32 stops;   ///< futex: grows when the runner has stopped
  u32 go;      ///< futex: grows when the runner is to go on
  u32 done;    ///< Commands::sequence of the calls made last
  u32 signal;  ///< that stopped the runner
  u64 fs_base, gs_base;
  u64 context;  ///< address of its ucontext
  s64 error;    ///< of the last call that failed
  u32 process, runner;
  u64 call_address;  ///< of a system call that stopped the runner: behind the instruction, or in the vsyscall page
  u8 scratch[8];
  u32 cpu;                        ///< that the runner was on when it stopped
  u8 rest[STUB_BLOCK_SIZE - 76];  ///< its upper end is the runner's signal stack
};
static_assert(offsetof(StubBlock, stops) == STUB_BLOCK_STOPS && offsetof(StubBlock, go) == STUB_BLOCK_GO &&
              offsetof(StubBlock, done) == STUB_BLOCK_DONE && offsetof(StubBlock, signal) == STUB_BLOCK_SIGNAL &&
              offsetof(StubBlock, fs_base) == STUB_BLOCK_FS_BASE &&
              offsetof(StubBlock, gs_base) == STUB_BLOCK_GS_BASE &&
              offsetof(StubBlock, context) == STUB_BLOCK_CONTEXT && offsetof(StubBlock, error) == STUB_BLOCK_ERROR &&
              offsetof(StubBlock, process) == STUB_BLOCK_PROCESS && offsetof(StubBlock, runner) == STUB_BLOCK_RUNNER &&
              offsetof(StubBlock, call_address) == STUB_BLOCK_CALL_ADDRESS &&
              offsetof(StubBlock, scratch) == STUB_BLOCK_SCRATCH && offsetof(StubBlock, cpu) == STUB_BLOCK_CPU &&
              sizeof(StubBlock) == STUB_BLOCK_SIZE);

inline constexpr u32 signal_stack = 0x1000;  ///< where it begins in the block

}  // namespace anykvm::engine::direct

/// stub.S: position-independent, smaller than STUB_CODE_SIZE.
extern "C" {
[[gnu::visibility("hidden")]] extern const unsigned char anykvm_stub_begin[], anykvm_stub_end[];
/// Where a new process begins, and the runner's signal handler: [anykvm_stub_begin, anykvm_stub_end).
[[gnu::visibility("hidden")]] extern const unsigned char anykvm_stub_zygote[], anykvm_stub_handler[];
}
#endif
