// The monitor of monitor.h: 32-bit protected mode, flat segments, no paging.
#include "monitor.h"

    .section .rodata
    .globl monitor_boot, monitor_boot_end, monitor_code, monitor_code_end, monitor_stubs
#define VECTORS_WITH_ERROR_CODE (1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21)
#define AT(label) (MONITOR_CODE + (label) - monitor_code)

    .code16
monitor_boot:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl MONITOR_BOOT + gdtr - monitor_boot
    movl $0x31, %eax
    movl %eax, %cr0
    ljmpl $0x08, $AT(next_test)
gdtr:
    .word MONITOR_GDT_SIZE - 1
    .long MONITOR_GDT
monitor_boot_end:

    .code32
    .balign 16
monitor_code:
next_test:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $MONITOR_STACK, %esp
    pushl $2
    popfl
    movl $0x31, %eax
    movl %eax, %cr0
    xorl %eax, %eax
    movl %eax, %cr4
    xorl %edx, %edx
    movl $0xc0000080, %ecx
    wrmsr
    movl %eax, %cr2
    movl %eax, %dr7
    movl %eax, %dr6
    cld
    movl $MONITOR_PRISTINE, %esi
    movl $MONITOR_TABLES, %edi
    movl $MONITOR_TABLES_SIZE / 4, %ecx
    rep movsl
    movl $AT(copies), %esi
    movl $4, %edx
1:  lodsl
    movl %eax, %edi
    lodsl
    movl %eax, %ecx
    xorl %eax, %eax
    rep stosl
    decl %edx
    jnz 1b
    movl $PAGING_FRAMES, %edi
    movl $0x1000, %ecx
    movl $0xcccccccc, %eax
    rep stosl
    lgdtl AT(gdt_pointer)
    lidtl AT(idt_pointer)
    ljmpl $0x08, $AT(1f)
1:  xorl %eax, %eax
    lldt %ax
    movl $0x28, %eax
    ltr %ax
    // SYSENTER
    movl $0x174, %ecx
    movl $0x08, %eax
    xorl %edx, %edx
    wrmsr
    incl %ecx
    movl $MONITOR_STACK, %eax
    wrmsr
    incl %ecx
    movl $MONITOR_TEST_CODE + 0xe0, %eax
    wrmsr

    movl AT(current), %ebx
    cmpl MONITOR_COUNT, %ebx
    jae finished
    imull $MONITOR_TEST_SIZE, %ebx
    addl $MONITOR_TESTS, %ebx
    movl TEST_PATCHES(%ebx), %ecx
    leal TEST_PATCH(%ebx), %esi
    jecxz 3f
2:  movl (%esi), %edi
    movl 4(%esi), %eax
    movl %eax, (%edi)
    addl $8, %esi
    loop 2b
3:  leal TEST_CODE(%ebx), %esi
    movl $MONITOR_TEST_CODE, %edi
    movl $TEST_CODE_SIZE / 4, %ecx
    rep movsl
    movl TEST_CR4(%ebx), %eax
    movl %eax, %cr4
    movl TEST_CR3(%ebx), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    movl TEST_EFER(%ebx), %eax
    xorl %edx, %edx
    wrmsr
    movl TEST_CR0(%ebx), %eax
    movl %eax, %cr0

    testl $0x20000, TEST_FRAME + 8(%ebx)
    jz 4f
    pushl TEST_FRAME + 32(%ebx)
    pushl TEST_FRAME + 28(%ebx)
    pushl TEST_FRAME + 24(%ebx)
    pushl TEST_FRAME + 20(%ebx)
    jmp 5f
4:  testl $3, TEST_FRAME + 4(%ebx)
    jnz 5f
    movl TEST_FRAME + 16(%ebx), %eax
    movl TEST_FRAME + 12(%ebx), %ecx
    movl %eax, %ss
    movl %ecx, %esp
    jmp 6f
5:  pushl TEST_FRAME + 16(%ebx)
    pushl TEST_FRAME + 12(%ebx)
6:  pushl TEST_FRAME + 8(%ebx)
    pushl TEST_FRAME + 4(%ebx)
    pushl TEST_FRAME(%ebx)
    movl TEST_SEGMENTS + 4(%ebx), %eax
    movl %eax, %es
    movl TEST_SEGMENTS + 8(%ebx), %eax
    movl %eax, %fs
    movl TEST_SEGMENTS + 12(%ebx), %eax
    movl %eax, %gs
    movl TEST_SEGMENTS(%ebx), %eax
    movl %eax, %ds
    movl %cs:TEST_GPR(%ebx), %eax
    movl %cs:TEST_GPR + 4(%ebx), %ecx
    movl %cs:TEST_GPR + 8(%ebx), %edx
    movl %cs:TEST_GPR + 16(%ebx), %ebp
    movl %cs:TEST_GPR + 20(%ebx), %esi
    movl %cs:TEST_GPR + 24(%ebx), %edi
    movl %cs:TEST_GPR + 12(%ebx), %ebx
    iretl

finished:
    movl $MONITOR_EXIT_PORT, %edx
    xorl %eax, %eax
    outb %al, %dx
    jmp finished

// The vector lies on top of the frame. Stacks are below 64 KiB, and maybe 16-bit ones, or CPL 0's in the window. These
// are read as far as the event's frame goes: what lies above may not be mapped.
ended:
    pushal
    pushl %ds
    pushl %es
    pushl %fs
    pushl %gs
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    cld
    movzwl %sp, %ebx
    movl %ss, %eax
    larl %eax, %eax
    testl $0x400000, %eax
    jz 7f
    movl %esp, %ebx
7:  movl $AT(frame), %edi
    movl $24, %ecx
    xorl %eax, %eax
    rep stosl
    movl $24, %ecx
    cmpl $0x10000, %ebx
    jb 7f
    movl %ss:48(%ebx), %edx
    movl $VECTORS_WITH_ERROR_CODE, %eax
    movl $16, %ecx
    btl %edx, %eax
    adcl $0, %ecx
7:  movl %ebx, %esi
    movl $AT(frame), %edi
7:  movl %ss:(%esi), %eax
    stosl
    addl $4, %esi
    loop 7b
    movl %cr0, %ebp
    movl %ebp, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl AT(current), %edi
    imull $MONITOR_LOG_SIZE, %edi
    addl $MONITOR_LOG, %edi
    movl %ebx, %eax
    stosl
    movl %ss, %eax
    stosl
    movl %ebp, %eax
    stosl
    movl %cr4, %eax
    stosl
    movl %cr2, %eax
    stosl
    movl %dr6, %eax
    stosl
    xorl %eax, %eax
    str %ax
    stosl
    xorl %eax, %eax
    sldt %ax
    stosl
    movl $AT(frame), %esi
    movl $24, %ecx
    rep movsl
    movl $MONITOR_GDT, %esi
    movl $MONITOR_GDT_SIZE / 4, %ecx
    rep movsl
    movl $MONITOR_LDT, %esi
    movl $0x40 / 4, %ecx
    rep movsl
    movl $MONITOR_TSS, %esi
    movl $0x400 / 4, %ecx
    rep movsl
    movl $AT(copies), %ebx
8:  movl (%ebx), %esi
    movl 4(%ebx), %ecx
    addl $8, %ebx
    jecxz 9f
    rep movsl
    jmp 8b
9:  incl AT(current)
    jmp next_test

    .balign 4
current:
    .long 0
frame:
    .fill 24, 4, 0
gdt_pointer:
    .word MONITOR_GDT_SIZE - 1
    .long MONITOR_GDT
idt_pointer:
    .word MONITOR_IDT_SIZE - 1
    .long MONITOR_IDT

copies:  // address, number of words; the first four are cleared before a test
    .long PAGING_PD + 8, 2, PAGING_WINDOW_PT, 8, PAGING_PAE_PD + 32, 4, PAGING_PAE_WINDOW_PT, 16
    .long PAGING_FRAMES, 2, PAGING_FRAMES + 0x1000, 2, PAGING_FRAMES + 0x2000, 2, PAGING_FRAMES + 0x3000, 2
    .long 0, 0

    .balign 16
monitor_stubs:  // one every 16 bytes
    .set vector, 0
    .rept MONITOR_VECTORS
    pushl $vector
    jmp ended
    .balign 16
    .set vector, vector + 1
    .endr
monitor_code_end:

    .section .note.GNU-stack, "", @progbits
