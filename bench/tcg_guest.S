# The guest that runs the measured loops under QEMU: entered by PVH, it goes to long mode, times each loop by the TSC (which
# QEMU takes from the host) and writes the difference, eight bytes, to the debug console. Then it leaves by isa-debug-exit.

#ifndef ITERATIONS
#error "how many iterations?"
#endif

.section .note.pvh, "a", @note
  .long 4, 4, 18
  .asciz "Xen"
  .long start

.section .text.start, "ax"
.code32
.globl start
start:
  cli
  mov $stack_top, %esp
  mov $page_map, %eax
  mov %eax, %cr3
  mov %cr4, %eax
  or $(1 << 5), %eax              # PAE
  mov %eax, %cr4
  mov $0xc0000080, %ecx           # EFER.LME
  rdmsr
  or $(1 << 8), %eax
  wrmsr
  mov %cr0, %eax
  or $0x80000001, %eax            # PG, PE
  mov %eax, %cr0
  lgdt gdt_pointer
  ljmp $8, $long_mode

.code64
long_mode:
  mov $16, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  lea bench_integer_loop(%rip), %rbx
  call measure
  lea bench_memory_loop(%rip), %rbx
  call measure
  xor %eax, %eax
  out %al, $0xf4
  hlt

measure:                          # %rbx: the loop
  mov $(ITERATIONS / 10), %edi    # translate it before the clock runs
  mov $scratch, %esi
  call *%rbx
  rdtsc
  shl $32, %rdx
  lea (%rdx,%rax), %r12
  mov $ITERATIONS, %edi
  mov $scratch, %esi
  call *%rbx
  rdtsc
  shl $32, %rdx
  add %rdx, %rax
  sub %r12, %rax
  mov $8, %ecx
1:
  out %al, $0xe9
  shr $8, %rax
  loop 1b
  ret

.section .data
.balign 4096
page_map:
  .quad page_directories + 7
  .fill 511, 8, 0
page_directories:
  .quad page_directory + 7
  .fill 511, 8, 0
page_directory:                   # 1 GiB in pages of 2 MiB, where they are
.set gpa, 0
.rept 512
  .quad gpa + 0x87
  .set gpa, gpa + 0x200000
.endr
gdt:
  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
  .word gdt_pointer - gdt - 1
  .long gdt

.section .bss
.balign 4096
scratch:
  .skip 128 * 1024
stack:
  .skip 4096
stack_top:
.section .note.GNU-stack, "", @progbits
