// The guest of the host probe: what a stock kernel does in its first microseconds. It runs at `base`, entered in flat
// 32-bit protected mode without paging. Everything it needs (GDT, page tables) is laid out by host_probe.cpp, at the
// addresses named here. It writes its stage to `port` as it goes, and `done` at the end.

#define BASE 0x1000
#define PML4 0x2000
#define IDT 0x6000
#define STACK 0xa000
#define PORT 0x80
#define DONE 0x4b
#define ABS(label) (label - anykvm_probe_begin + BASE)

    .section .rodata
    .globl anykvm_probe_begin, anykvm_probe_end
    .hidden anykvm_probe_begin, anykvm_probe_end
    .balign 16
anykvm_probe_begin:
    .code32
    movb $1, %al                    // stage 1: runs at all
    outb %al, $PORT
    movl %cr4, %eax
    orl $0x620, %eax                // PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          // EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~0xc, %eax                // neither EM nor TS
    orl $0x80010022, %eax           // PG, WP, NE, MP
    movl %eax, %cr0
    ljmp $0x08, $ABS(long_mode)

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $STACK, %esp
    movb $2, %al                    // stage 2: long mode with paging
    outb %al, $PORT

    movl $ABS(handler), %eax        // an interrupt gate for vector 0x40
    movl $(IDT + 0x40 * 16), %edi
    movw %ax, (%rdi)
    movw $0x08, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shrl $16, %eax
    movw %ax, 6(%rdi)
    movq $0, 8(%rdi)
    lidt idt_pointer(%rip)

    movl $0xfee00000, %ebx          // the local APIC: on, and an IPI to itself
    movl $0x1ff, 0xf0(%rbx)
    xorl %esi, %esi
    sti
    movl $0, 0x310(%rbx)
    movl $0x44040, 0x300(%rbx)
    movl $50000000, %ecx
1:  pause
    testl %esi, %esi
    jnz 2f
    loop 1b
    movb $3, %al                    // no interrupt came
    outb %al, $PORT
    hlt
2:  movb $4, %al                    // stage 4: the interrupt came, and IRET went back
    outb %al, $PORT

    movl $20, %eax                  // SSE: 20 + 22 = 42
    cvtsi2sd %eax, %xmm0
    movl $22, %eax
    cvtsi2sd %eax, %xmm1
    addsd %xmm1, %xmm0
    cvttsd2si %xmm0, %eax
    cmpl $42, %eax
    jne 3f
    movb $DONE, %al
    outb %al, $PORT
3:  hlt
    jmp 3b

handler:
    incl %esi
    movl $0, 0xb0(%rbx)             // EOI
    iretq

    .balign 8
idt_pointer:
    .word 0x60 * 16 - 1
    .quad IDT
anykvm_probe_end:

    .section .note.GNU-stack, "", @progbits
