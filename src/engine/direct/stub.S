# What runs in the processes that execute guest user code natively; copied to stub_layout.h's fixed address.
#
# A zygote, with nothing but this area mapped, forks a process whenever it reads a request. Such a process has two
# threads. The mapper makes the system calls that the vCPU's thread has written into the commands, which nobody can
# change from inside. The runner executes the guest's code; a seccomp filter lets it make only the calls of its signal
# handler, and whatever else stops it is a signal: the handler tells the vCPU's thread and waits.
#include <asm/unistd.h>

#include "engine/direct/stub_layout.h"

#define COMMANDS (anykvm_stub_begin + STUB_COMMANDS)
#define BLOCK (anykvm_stub_begin + STUB_BLOCK)

#define FUTEX_WAIT 0
#define FUTEX_WAKE 1
# A runner that was killed may still stand in the queue, in front of the one that has its area now.
#define EVERY_WAITER 0x7fffffff
#define SIGCHLD 17
# CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD, _SYSVSEM
#define A_THREAD (0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000)
#define CLONE_PARENT_SETTID 0x100000

# Makes the system calls of the commands.
.macro make_calls
    leaq COMMANDS + STUB_CALLS(%rip), %rbx
    movl COMMANDS + STUB_COMMANDS_COUNT(%rip), %ebp
1:  testl %ebp, %ebp
    jz 3f
    movq (%rbx), %rax
    movq 8(%rbx), %rdi
    movq 16(%rbx), %rsi
    movq 24(%rbx), %rdx
    movq 32(%rbx), %r10
    movq 40(%rbx), %r8
    movq 48(%rbx), %r9
    syscall
    testq %rax, %rax
    jns 2f
    movq %rax, BLOCK + STUB_BLOCK_ERROR(%rip)
2:  addq $STUB_CALL_SIZE, %rbx
    decl %ebp
    jmp 1b
3:
.endm

# The value is in %edx.
.macro futex word, operation
    leaq \word(%rip), %rdi
    movl $\operation, %esi
    xorl %r10d, %r10d
    movl $__NR_futex, %eax
    syscall
.endm

    .section .rodata.anykvm_stub, "a", @progbits
    .p2align 4
    .globl anykvm_stub_begin, anykvm_stub_end, anykvm_stub_zygote, anykvm_stub_handler
    .hidden anykvm_stub_begin, anykvm_stub_end, anykvm_stub_zygote, anykvm_stub_handler
anykvm_stub_begin:

# %r15d: the socket that requests come from.
anykvm_stub_zygote:
    make_calls
    movl $1, BLOCK + STUB_BLOCK_DONE(%rip)
    movl $1, %edx
    futex BLOCK+STUB_BLOCK_DONE, FUTEX_WAKE
next_request:
    xorl %eax, %eax  # __NR_read
    movl %r15d, %edi
    leaq BLOCK + STUB_BLOCK_SCRATCH(%rip), %rsi
    movl $1, %edx
    syscall
    cmpq $-4, %rax  # EINTR
    je next_request
    testq %rax, %rax
    jg make_process
    movl $__NR_exit_group, %eax
    xorl %edi, %edi
    syscall
make_process:
    movl $__NR_clone, %eax
    movl $(CLONE_PARENT_SETTID | SIGCHLD), %edi
    xorl %esi, %esi
    leaq BLOCK + STUB_BLOCK_PROCESS(%rip), %rdx
    xorl %r10d, %r10d
    xorl %r8d, %r8d
    syscall
    testq %rax, %rax
    jnz next_request

    make_calls  # the last brings the process' own commands
    movl $__NR_clone, %eax
    movl $(A_THREAD | CLONE_PARENT_SETTID), %edi
    leaq BLOCK + STUB_BLOCK_SIZE(%rip), %rsi
    leaq BLOCK + STUB_BLOCK_RUNNER(%rip), %rdx
    xorl %r10d, %r10d
    xorl %r8d, %r8d
    syscall
    testq %rax, %rax
    jz runner

    xorl %r12d, %r12d
mapper:
    movl %r12d, %edx
    cmpl %r12d, COMMANDS + STUB_COMMANDS_SEQUENCE(%rip)
    jne serve
    futex COMMANDS+STUB_COMMANDS_SEQUENCE, FUTEX_WAIT
    jmp mapper
serve:
    movl COMMANDS + STUB_COMMANDS_SEQUENCE(%rip), %r12d
    movl COMMANDS + STUB_COMMANDS_THEN_GO(%rip), %r13d  # the next commands may come as soon as these are done
    make_calls
    movl %r12d, BLOCK + STUB_BLOCK_DONE(%rip)
    movl $EVERY_WAITER, %edx
    testl %r13d, %r13d
    jnz then_go
    futex BLOCK+STUB_BLOCK_DONE, FUTEX_WAKE
    jmp mapper
then_go:
    lock incl BLOCK + STUB_BLOCK_GO(%rip)
    futex BLOCK+STUB_BLOCK_GO, FUTEX_WAKE
    jmp mapper

runner:
    make_calls
    ud2  # the first stop

# A signal, in %edi; its siginfo_t is in %rsi, its ucontext in %rdx. All others are blocked.
anykvm_stub_handler:
    movl %edi, BLOCK + STUB_BLOCK_SIGNAL(%rip)
    movq %rdx, BLOCK + STUB_BLOCK_CONTEXT(%rip)
    movq 16(%rsi), %rax  # si_call_addr, if it is SIGSYS
    movq %rax, BLOCK + STUB_BLOCK_CALL_ADDRESS(%rip)
    movl $0x7b, %eax  # Linux' segment of each CPU, whose limit has the CPU's number
    lsll %eax, %eax
    andl $0xfff, %eax
    movl %eax, BLOCK + STUB_BLOCK_CPU(%rip)
    rdfsbase %rax
    movq %rax, BLOCK + STUB_BLOCK_FS_BASE(%rip)
    rdgsbase %rax
    movq %rax, BLOCK + STUB_BLOCK_GS_BASE(%rip)
    movl BLOCK + STUB_BLOCK_GO(%rip), %ebx
    lock incl BLOCK + STUB_BLOCK_STOPS(%rip)
    movl $1, %edx
    futex BLOCK+STUB_BLOCK_STOPS, FUTEX_WAKE
stopped:
    cmpl %ebx, BLOCK + STUB_BLOCK_GO(%rip)
    jne go
    movl %ebx, %edx
    futex BLOCK+STUB_BLOCK_GO, FUTEX_WAIT
    jmp stopped
go:
    movq BLOCK + STUB_BLOCK_FS_BASE(%rip), %rax
    wrfsbase %rax
    movq BLOCK + STUB_BLOCK_GS_BASE(%rip), %rax
    wrgsbase %rax
    addq $8, %rsp  # the return address, which would lead here
    movl $__NR_rt_sigreturn, %eax
    syscall

anykvm_stub_end:
    .org anykvm_stub_begin + STUB_CODE_SIZE  # an error if the code is longer
    .section .note.GNU-stack, "", @progbits
