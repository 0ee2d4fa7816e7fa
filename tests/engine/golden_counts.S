# How many host instructions common forms become, so that a worse translation shows in review: golden_counts_test.cpp
# says what is counted, and how to bring the numbers up to date.
#
#   user   the flags behind it are overwritten before anything reads them, as they are behind most code
#   flags  somebody reads the flags behind it
#   kernel the same as user, with the rights of a supervisor and no vector registers
#   user32 the same as user, of 32-bit code on flat segments
#
# A form with only 2 that looks like more is a step of the reference engine: a request and a call.
  .intel_syntax noprefix

  .macro row situation, count, code, bits=64
  .pushsection .rodata.golden_code, "a"
  .code\bits
.Lcode\@:
  \code
  .code64
.Lend\@:
.Ltext\@:
  .asciz "\code"
  .popsection
  .quad .Lcode\@, .Lend\@, .Ltext\@, \situation, \count
  .endm
  .macro user count, code
  row 0, \count, "\code"
  .endm
  .macro flags count, code
  row 1, \count, "\code"
  .endm
  .macro kernel count, code
  row 2, \count, "\code"
  .endm
  .macro user32 count, code
  row 3, \count, "\code", 32
  .endm

  .section .data.rel.ro.golden_table, "aw"
  .globl anykvm_golden_begin, anykvm_golden_end
anykvm_golden_begin:

# Registers
user     0, "nop"
user     1, "mov rax, rbx"
user     3, "mov r13, rbx"
user     4, "mov r13, r14"
user     1, "add rax, rbx"
user     4, "add r13, r14"
user     3, "add r13d, 8"
user     1, "imul rax, rbx, 24"
user     1, "shl rax, cl"
user     1, "movzx eax, bl"
user     1, "mov ah, bl"
user     1, "xchg rax, rbx"
user     2, "cmp rax, rbx; setb cl"
user     2, "cmp rax, rbx; cmovb rcx, rdx"
user     1, "lea rax, [rbx + rcx * 4 + 8]"
user     4, "lea rax, [r13 + r14]"
user     3, "lea rax, [rip + 0x1234]"
user     1, "div rbx"
user     1, "popcnt rax, rbx"
user     1, "andn rax, rbx, rcx"
user     1, "mulx rax, rbx, rcx"

# One access
user     8, "mov rax, [rbx]"
flags   12, "mov rax, [rbx]"
user     8, "mov rax, [rbx + rcx * 8 + 16]"
flags   13, "mov rax, [rbx + rcx * 8 + 16]"
user     8, "mov rax, [r13]"
user    10, "mov r13, [rbx]"
user     9, "mov eax, [rip + 0x1234]"
user    10, "mov rax, fs:[0x28]"
user     8, "movzx eax, byte ptr [rbx]"
user    12, "mov ah, [rbx]"
user     8, "mov [rbx], rax"
flags   12, "mov [rbx], rax"
user     8, "mov [rbx + rcx], al"
user     9, "mov [rbx], r13"
user     8, "mov dword ptr [rbx], 1"
user     8, "add rax, [rbx]"
user     8, "cmp qword ptr [rbx], 0"
user     8, "add [rbx], rax"
flags    8, "add [rbx], rax"
user     8, "inc dword ptr [rbx]"
user     8, "lock add [rbx], rax"
user     8, "lock xadd [rbx], eax"
user     8, "lock cmpxchg [rbx], rcx"
user     8, "xchg [rbx], rax"
user    23, "bts [rbx], rax"
user     0, "prefetcht0 [rbx]"
user    16, "stosq"
user    16, "scasb"

# The stack
user     9, "push rax"
flags   14, "push rax"
user    10, "push r13"
user     9, "push 1"
user    19, "push qword ptr [rbx]"
user     9, "pop rax"
flags   14, "pop rax"
user    10, "leave"
user    23, "pushfq"
user     2, "popfq"

# Accesses that are checked together
user    12, "push rbp; push rbx"
user    25, "push rbp; mov rbp, rsp; push r15; push r14; push r13; push r12; push rbx; sub rsp, 24"
user    24, "add rsp, 24; pop rbx; pop r12; pop r13; pop r14; pop r15; pop rbp"
user    10, "mov rax, [rsp + 8]; mov [rsp + 16], rax"
user    11, "mov rax, [rbx]; mov rcx, [rbx + 8]; mov rdx, [rbx + 16]"
user    16, "mov rax, [rbx]; mov [rcx], rax"

# Branches
user     2, "cmp rax, rbx; jz . + 64"
user     6, "cmp rax, rbx; jz . + 0x2000"
user     9, "1: dec rcx; jnz 1b"
user    14, "1: add rax, [rbx + rcx]; sub rcx, 8; jnz 1b"
user     0, "jmp . + 64"
user     4, "jmp . + 0x2000"
user     7, "1: jmp 1b"
user     3, "jrcxz . + 64"
user    17, "call . + 64"
user    20, "call . + 0x2000"
user    34, "call rax"
user    45, "call [rbx]"
user    14, "jmp rax"
user    26, "jmp [rbx + rcx * 8]"
user    27, "ret"

# Strings
user     2, "rep movsb"
user     2, "rep stosq"
user    27, "movsq"
user    16, "lodsb"

# Vectors, x87
user     1, "paddd xmm0, xmm1"
user     8, "movaps xmm0, [rbx]"
user     8, "movdqu xmm0, [rbx]"
user     8, "movups [rbx], xmm0"
user     8, "addsd xmm0, [rbx + rcx * 8]"
user    11, "movsd xmm0, [rbx]; mulsd xmm0, [rbx + 8]; movsd [rbx + 16], xmm0"
user     2, "ucomisd xmm0, xmm1; ja . + 64"
user     1, "cvtsi2sd xmm0, rax"
user     1, "cvttsd2si rax, xmm0"
user     1, "movq rax, xmm0"
user     1, "pmovmskb eax, xmm0"
user     8, "vaddpd ymm0, ymm1, [rbx]"
user     8, "vpcmpeqb k1, zmm0, [rbx]"
user     1, "aesenc xmm0, xmm1"
user    16, "fld qword ptr [rbx]"
user    40, "fld qword ptr [rbx]; fmul qword ptr [rcx]; fstp qword ptr [rdx]"
user     6, "faddp"

# System
user     2, "syscall"
user    14, "rdtsc"
user     2, "cpuid"
user     5, "cld"
user     0, "pause"
user     1, "mfence"
user     2, "mov eax, ds"
kernel   8, "mov rax, [rbx]"
kernel  10, "mov rax, gs:[0x28]"
kernel   5, "cli"
kernel  13, "sti; nop"
kernel  32, "pushfq; pop rax; cli"
kernel   8, "swapgs"
kernel  16, "stac"
kernel  15, "clac"
kernel  12, "lock bts qword ptr [rbx], 3"
kernel   2, "invlpg [rax]"
kernel   2, "mov rax, cr2"
kernel   2, "mov cr3, rax"
kernel   2, "in al, dx"
kernel   2, "rdmsr"
kernel   2, "wrmsr"
kernel   2, "sysretq"
kernel   2, "iretq"

# 32-bit code
user32   1, "mov eax, ebx"
user32   1, "inc eax"
user32   1, "mov ah, bl"
user32   1, "lea eax, [ebx + ecx * 4 + 8]"
user32   8, "mov eax, [ebx]"
user32   8, "mov eax, [ebx + ecx * 8 + 16]"
user32   8, "mov eax, [0x1234]"
user32  12, "mov eax, gs:[0x14]"
user32   8, "add [ebx], eax"
user32   8, "movsd xmm0, [ebx]"
user32  16, "fld qword ptr [ebx]"
user32   9, "push eax"
user32   9, "pop eax"
user32  21, "push ebp; mov ebp, esp; push edi; push esi; push ebx; sub esp, 24"
user32  10, "leave"
user32  27, "ret"
user32  17, "call . + 64"
user32  32, "call eax"
user32   9, "1: dec ecx; jnz 1b"
user32   2, "pusha"
user32   2, "rep movsd"
user32   2, "aaa"
user32   2, "int 0x80"
user32   2, "mov ds, eax"

anykvm_golden_end:

  .section .note.GNU-stack, "", @progbits
