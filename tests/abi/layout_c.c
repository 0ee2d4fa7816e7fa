/* The values of layout_values.inc as a C compiler sees them, from the header itself. */
#include <linux/kvm.h>
#include <stddef.h>

#define VALUE(expression) (unsigned long)(expression),
const unsigned long layout_in_c[] = {
#include "layout_values.inc"
};
const unsigned long layout_in_c_count = sizeof layout_in_c / sizeof layout_in_c[0];
