// The measured loops of loops.S.
#pragma once

#include <cstdint>

extern "C" {
void bench_integer_loop(std::uint64_t iterations, void* scratch);
void bench_memory_loop(std::uint64_t iterations, void* scratch);
extern const unsigned char bench_loops_begin[], bench_loops_end[];
}

constexpr double integer_loop_instructions = 10, memory_loop_instructions = 12;
