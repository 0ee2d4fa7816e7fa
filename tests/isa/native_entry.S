# Into a case and out of it, in the worker process. The state is reached RIP-relative, from any register state.

.set s_gpr, anykvm_isa_state
.set s_rip, anykvm_isa_state+128
.set s_rflags, anykvm_isa_state+144
.set s_ss, anykvm_isa_state+160
.set s_host_rsp, anykvm_isa_state+168
.set s_host_fs, anykvm_isa_state+176
.set s_bases, anykvm_isa_state+184
.set s_es, anykvm_isa_state+200
.set s_ds, anykvm_isa_state+202
.set s_fs, anykvm_isa_state+204
.set s_gs, anykvm_isa_state+206
.set s_sets_bases, anykvm_isa_state+208
.set s_features, anykvm_isa_state+216
.set s_mxcsr, anykvm_isa_state+224

.set user_data_selector, 0x2b

# What the case has left, and the host's own instead. Changes RAX.
.macro exchange_segments
  movw %es, s_es(%rip)
  movw %ds, s_ds(%rip)
  movw %fs, s_fs(%rip)
  movw %gs, s_gs(%rip)
  rdfsbase %rax
  mov %rax, s_bases(%rip)
  rdgsbase %rax
  mov %rax, s_bases+8(%rip)
  mov $user_data_selector, %eax
  mov %eax, %ss
  xor %eax, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %fs
  mov %eax, %gs
  mov s_host_fs(%rip), %rax
  wrfsbase %rax
.endm

# From anykvm_isa_enter. RSP is what it pushed.
.macro return_to_host
  fninit
  ldmxcsr s_mxcsr(%rip)
  vzeroall
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
.endm

.text
.globl anykvm_isa_enter, anykvm_isa_exit, anykvm_isa_signal, anykvm_isa_abort

# void anykvm_isa_enter(): returns when the case has come to its end or was ended by anykvm_isa_abort.
anykvm_isa_enter:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, s_host_rsp(%rip)
  rdfsbase %rax
  mov %rax, s_host_fs(%rip)
  mov s_features(%rip), %eax
  mov s_features+4(%rip), %edx
  xrstor64 anykvm_isa_image(%rip)
  movw s_es(%rip), %es
  movw s_ds(%rip), %ds
  movw s_fs(%rip), %fs
  movw s_gs(%rip), %gs
  cmpl $0, s_sets_bases(%rip)
  je 1f
  mov s_bases(%rip), %rax
  wrfsbase %rax
  mov s_bases+8(%rip), %rax
  wrgsbase %rax
1:
  mov s_gpr+0(%rip), %rax
  mov s_gpr+8(%rip), %rcx
  mov s_gpr+16(%rip), %rdx
  mov s_gpr+24(%rip), %rbx
  mov s_gpr+40(%rip), %rbp
  mov s_gpr+48(%rip), %rsi
  mov s_gpr+56(%rip), %rdi
  mov s_gpr+64(%rip), %r8
  mov s_gpr+72(%rip), %r9
  mov s_gpr+80(%rip), %r10
  mov s_gpr+88(%rip), %r11
  mov s_gpr+96(%rip), %r12
  mov s_gpr+104(%rip), %r13
  mov s_gpr+112(%rip), %r14
  mov s_gpr+120(%rip), %r15
  movabs $0x4a126b3d5000, %rsp  # frame_address
  iretq

# Where a case ends; the page at exit_address jumps here.
anykvm_isa_exit:
  mov %rsp, s_gpr+32(%rip)
  mov %rax, s_gpr+0(%rip)
  mov %rcx, s_gpr+8(%rip)
  mov %rdx, s_gpr+16(%rip)
  mov %rbx, s_gpr+24(%rip)
  mov %rbp, s_gpr+40(%rip)
  mov %rsi, s_gpr+48(%rip)
  mov %rdi, s_gpr+56(%rip)
  mov %r8, s_gpr+64(%rip)
  mov %r9, s_gpr+72(%rip)
  mov %r10, s_gpr+80(%rip)
  mov %r11, s_gpr+88(%rip)
  mov %r12, s_gpr+96(%rip)
  mov %r13, s_gpr+104(%rip)
  mov %r14, s_gpr+112(%rip)
  mov %r15, s_gpr+120(%rip)
  mov s_host_rsp(%rip), %rsp
  pushfq
  popq s_rflags(%rip)
  pushq $2
  popfq
  mov %ss, %eax
  movw %ax, s_ss(%rip)
  mov s_features(%rip), %eax
  mov s_features+4(%rip), %edx
  xsave64 anykvm_isa_image(%rip)
  exchange_segments
  return_to_host

# The signal handler: the C++ one must not meet AC, the case's segments and FS base, the next IRETQ no NT.
anykvm_isa_signal:
  pushfq
  andq $~0x44500, (%rsp)
  popfq
  exchange_segments
  jmp anykvm_isa_on_signal

# Out of the signal handler without sigreturn, which would cost as much again.
anykvm_isa_abort:
  mov s_host_rsp(%rip), %rsp
  return_to_host

.section .note.GNU-stack,"",@progbits
