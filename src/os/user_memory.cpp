#include "os/user_memory.h"

#include "os/fault_guard.h"

// The copy itself: the one piece of code in which a fault at any instruction means "bad pointer". fault_guard.cpp knows
// its limits and continues a fault at anykvm_user_copy_fault. It touches no stack, so that the continuation can return.
asm(R"(
    .pushsection .text.anykvm_user_copy, "ax", @progbits
    .hidden anykvm_user_copy
    .hidden anykvm_user_copy_end
    .hidden anykvm_user_copy_fault
    .globl anykvm_user_copy
    .globl anykvm_user_copy_end
    .globl anykvm_user_copy_fault
    .type anykvm_user_copy, @function
    .p2align 4
anykvm_user_copy:
    .cfi_startproc
    cmpq $512, %rdx
    ja 3f
1:  subq $8, %rdx
    jb 2f
    movq (%rsi), %rax
    movq %rax, (%rdi)
    addq $8, %rsi
    addq $8, %rdi
    jmp 1b
2:  addq $8, %rdx
    jz 4f
3:  movq %rdx, %rcx
    rep movsb
4:  movl $1, %eax
    ret
anykvm_user_copy_end:
anykvm_user_copy_fault:
    xorl %eax, %eax
    ret
    .cfi_endproc
    .size anykvm_user_copy, . - anykvm_user_copy
    .popsection
)");

extern "C" bool anykvm_user_copy(void* to, const void* from, std::size_t size);

namespace anykvm::os {

bool copy_from_user(void* dst, const void* user, std::size_t size) {
  install_fault_handlers();
  return anykvm_user_copy(dst, user, size);
}

bool copy_to_user(void* user, const void* src, std::size_t size) {
  install_fault_handlers();
  return anykvm_user_copy(user, src, size);
}

}  // namespace anykvm::os
