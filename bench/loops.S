# The loops that are measured, copied into a guest: they are position-independent, touch only caller-saved registers, and lie in one piece.
# Arguments: %rdi = iterations, %rsi = 128 KiB of scratch memory. bench/loops.h says how many instructions an iteration has.

.section .text.loops, "ax"
.globl bench_loops_begin, bench_loops_end, bench_integer_loop, bench_memory_loop
bench_loops_begin:

# Ten instructions of register arithmetic.
.balign 64
bench_integer_loop:
  mov %rdi, %rcx
  mov $1, %eax
  mov $2, %edx
1:
  add %rcx, %rax
  xor %rax, %rdx
  rol $7, %rdx
  lea 3(%rax,%rdx,2), %rsi
  imul %rsi, %rax
  sub %rdx, %rax
  shr $3, %rsi
  add %rsi, %rdx
  dec %rcx
  jnz 1b
  ret

# Twelve instructions: a load, a store, a push, a pop and a call in each iteration, over 64 KiB.
.balign 64
bench_memory_loop:
  mov %rdi, %rcx
  xor %r8d, %r8d
  xor %edx, %edx
1:
  mov (%rsi,%r8), %rax
  add %rcx, %rax
  mov %rax, 8(%rsi,%r8)
  lea 64(%r8), %r8
  and $0xffc0, %r8d
  push %rax
  call 2f
  pop %rax
  dec %rcx
  jnz 1b
  ret
2:
  xor %rax, %rdx
  ret

bench_loops_end:
.section .note.GNU-stack, "", @progbits
