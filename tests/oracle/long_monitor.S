// The monitor of long_monitor.h: 64-bit code at CPL 0.
#include "long_monitor.h"

    .section .rodata
    .globl long_boot, long_boot_end, long_code, long_code_end, long_stubs
#define AT(label) (LONG_CODE + (label) - long_code)

    .code16
long_boot:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl LONG_BOOT + boot_gdtr - long_boot
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $0x58, $AT(enter_long_mode)
boot_gdtr:
    .word LONG_GDT_LIMIT
    .long LONG_GDT
long_boot_end:

    .code32
    .balign 16
long_code:
enter_long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl LONG_CR4, %eax
    movl %eax, %cr4
    movl LONG_CR3, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl $0x901, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80010031, %eax
    movl %eax, %cr0
    ljmpl $0x08, $AT(next_test)

    .code64
next_test:
    movl $0x10, %eax
    movl %eax, %ss
    movl $LONG_STACK, %esp
    pushq $2
    popfq
    movl $0x80010031, %eax
    movq %rax, %cr0
    movq LONG_CR4, %rax
    movq %rax, %cr4
    xorl %eax, %eax
    movq %rax, %cr2
    movq %rax, %cr8
    movq %rax, %dr7
    movq %rax, %dr6
    movl $LONG_PRISTINE, %esi
    movl $LONG_TABLES, %edi
    movl $LONG_TABLES_SIZE / 8, %ecx
    rep movsq
    lgdtq AT(gdt_pointer)
    lidtq AT(idt_pointer)
    xorl %eax, %eax
    lldt %ax
    movl $0x38, %eax
    ltr %ax
    // Another task's segments must not shine through, nor an NMI that the test before has left waiting: IRET lets it in.
    incl AT(drains)
    movq %rsp, %rax
    pushq $0x10
    pushq %rax
    pushq $2
    pushq $0x08
    pushq $AT(1f)
    iretq
1:  decl AT(drains)
    movl AT(current), %ebx
    cmpl LONG_COUNT, %ebx
    jae finished
    imull $LONG_TEST_SIZE, %ebx
    addl $LONG_TESTS, %ebx

    leal LONG_TEST_PATCHES(%rbx), %esi
    lodsq
    movl %eax, %ecx
    jrcxz 3f
2:  lodsq
    movq %rax, %rdi
    movsq
    loop 2b
3:  leal LONG_TEST_CODE(%rbx), %esi
    movl $LONG_USER_CODE, %edi
    movl $LONG_TEST_CODE_SIZE / 8, %ecx
    rep movsq
    leal LONG_TEST_CODE(%rbx), %esi
    movl $LONG_SUPER_CODE, %edi
    movl $LONG_TEST_CODE_SIZE / 8, %ecx
    rep movsq
    movq LONG_CR3, %rax
    movq %rax, %cr3

    movl LONG_TEST_SEGMENTS(%rbx), %eax
    movl %eax, %ds
    movl LONG_TEST_SEGMENTS + 8(%rbx), %eax
    movl %eax, %es
    movl LONG_TEST_SEGMENTS + 16(%rbx), %eax
    movl %eax, %fs
    movl LONG_TEST_SEGMENTS + 24(%rbx), %eax
    movl %eax, %gs
    movl $LONG_MSRS, %esi
    call write_msrs
    leal LONG_TEST_MSRS(%rbx), %esi
    call write_msrs

    movq LONG_CR4, %rax
    orl $0x400000, %eax  // PKE
    movq %rax, %cr4
    movl LONG_TEST_PKRU(%rbx), %eax
    xorl %ecx, %ecx
    xorl %edx, %edx
    wrpkru

    pushq LONG_TEST_FRAME + 32(%rbx)
    pushq LONG_TEST_FRAME + 24(%rbx)
    pushq LONG_TEST_FRAME + 16(%rbx)
    pushq LONG_TEST_FRAME + 8(%rbx)
    pushq LONG_TEST_FRAME(%rbx)
    movq LONG_TEST_CR4(%rbx), %rax
    movq %rax, %cr4
    movq LONG_TEST_CR0(%rbx), %rax
    movq %rax, %cr0
    movq LONG_TEST_DR(%rbx), %rax
    movq %rax, %dr0
    movq LONG_TEST_DR + 8(%rbx), %rax
    movq %rax, %dr1
    movq LONG_TEST_DR + 16(%rbx), %rax
    movq %rax, %dr2
    movq LONG_TEST_DR + 24(%rbx), %rax
    movq %rax, %dr3
    movq LONG_TEST_DR7(%rbx), %rax
    movq %rax, %dr7

    movq 0x00(%rbx), %rax
    movq 0x08(%rbx), %rcx
    movq 0x10(%rbx), %rdx
    movq 0x28(%rbx), %rbp
    movq 0x30(%rbx), %rsi
    movq 0x38(%rbx), %rdi
    movq 0x40(%rbx), %r8
    movq 0x48(%rbx), %r9
    movq 0x50(%rbx), %r10
    movq 0x58(%rbx), %r11
    movq 0x60(%rbx), %r12
    movq 0x68(%rbx), %r13
    movq 0x70(%rbx), %r14
    movq 0x78(%rbx), %r15
    movq 0x18(%rbx), %rbx
    iretq

finished:
    movl $LONG_EXIT_PORT, %edx
    xorl %eax, %eax
    outb %al, %dx
    jmp finished

// Pairs of index and value at RSI, their number before them.
write_msrs:
    lodsq
    movl %eax, %edi
1:  testl %edi, %edi
    jz 2f
    movl (%rsi), %ecx
    movl 8(%rsi), %eax
    movl 12(%rsi), %edx
    wrmsr
    addl $16, %esi
    decl %edi
    jmp 1b
2:  ret

// The vector lies on top of the frame.
ended:
    cmpl $0, AT(drains)
    jne drained
    pushq %r15
    pushq %r14
    pushq %r13
    pushq %r12
    pushq %r11
    pushq %r10
    pushq %r9
    pushq %r8
    pushq %rdi
    pushq %rsi
    pushq %rbp
    pushq %rbx
    pushq %rdx
    pushq %rcx
    pushq %rax
    cld
    movq %dr7, %r8
    xorl %eax, %eax
    movq %rax, %dr7
    movq %cr4, %r9
    movq LONG_CR4, %rax
    movq %rax, %cr4
    movl AT(current), %edi
    imull $LONG_LOG_SIZE, %edi
    addl $LONG_LOG, %edi
    movl AT(current), %eax
    incl %eax
    stosq
    movq %rsp, %rsi
    movl $24, %ecx
    rep movsq
    movq %rsp, %rax
    stosq
    movq %cr0, %rax
    stosq
    movq %cr2, %rax
    stosq
    movq %cr3, %rax
    stosq
    movq %r9, %rax
    stosq
    movq %cr8, %rax
    stosq
    movq %r8, %rax
    stosq
    movq %dr6, %rax
    stosq
    movq %dr0, %rax
    stosq
    movq %dr1, %rax
    stosq
    movq %dr2, %rax
    stosq
    movq %dr3, %rax
    stosq
    movl $AT(logged_msrs), %esi
    movl $10, %r10d
1:  lodsl
    movl %eax, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    stosq
    decl %r10d
    jnz 1b
    movl %ds, %eax
    stosq
    movl %es, %eax
    stosq
    movl %fs, %eax
    stosq
    movl %gs, %eax
    stosq
    xorl %eax, %eax
    str %ax
    stosq
    xorl %eax, %eax
    sldt %ax
    stosq
    sgdtq (%rdi)
    sidtq 16(%rdi)
    addq $32, %rdi
    xorl %eax, %eax
    btl $22, %r9d
    jnc 2f
    movq %cr4, %rdx
    movq %rdx, %rsi
    orl $0x400000, %edx
    movq %rdx, %cr4
    xorl %ecx, %ecx
    rdpkru
    movq %rsi, %cr4
2:  stosq
    movl $AT(copies), %ebx
3:  movl (%rbx), %esi
    movl 4(%rbx), %ecx
    jrcxz 4f
    rep movsq
    addl $8, %ebx
    jmp 3b
4:  incl AT(current)
    jmp next_test

drained:
    addq $8, %rsp
    iretq

    .balign 8
current:
    .quad 0
drains:
    .quad 0
gdt_pointer:
    .word LONG_GDT_LIMIT
    .quad LONG_GDT
idt_pointer:
    .word LONG_VECTORS * 16 - 1
    .quad LONG_IDT
    .balign 4
logged_msrs:
    .long 0xc0000080, 0xc0000100, 0xc0000101, 0xc0000102, 0xc0000081, 0xc0000082, 0xc0000084, 0x174, 0x175, 0x176
copies:  // address, number of words
    .long LONG_GDT, 48, LONG_LDT, 4, LONG_PML5, 2, LONG_PML4, 2, LONG_WINDOW_PDPT, 4, LONG_WINDOW_PD, 4
    .long LONG_WINDOW_PT, 8, LONG_WINDOW_PT2, 4, LONG_PT + 0x1a * 8, 10, LONG_FRAMES, 2, LONG_FRAMES + 0x1000, 2
    .long LONG_FRAMES + 0x2000, 2, LONG_FRAMES + 0x3000, 2, LONG_USER_STACK - 0x60, 16, LONG_RSP0 - 0x40, 8
    .long LONG_IST3 - 0x40, 8
    .long 0, 0

    .balign 16
long_stubs:  // one every 16 bytes
    .set vector, 0
    .rept LONG_VECTORS
    pushq $vector
    jmp ended
    .balign 16
    .set vector, vector + 1
    .endr
long_code_end:

    .section .note.GNU-stack, "", @progbits
