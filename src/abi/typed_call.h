// From a typed method to a row of the ioctl table: the argument's type, size and direction follow from the method's
// signature and the ioctl's number, and so does the handler that copies the structure in and out.
#pragma once

#include <linux/ioctl.h>

#include <cerrno>
#include <type_traits>

#include "abi/ioctl_table.h"
#include "anykvm/kvm.h"
#include "os/user_memory.h"

namespace anykvm::abi {

/// "kvm_regs", "u32" ... as the compiler spells it.
template <class T>
consteval std::string_view type_name() {
  const std::string_view function = __PRETTY_FUNCTION__;
  const auto begin = function.find("T = ") + 4;
  return function.substr(begin, function.find_first_of(";]", begin) - begin);
}

namespace detail {

template <class Method>
struct Signature;
template <class C, class R>
struct Signature<R (C::*)()> {
  using Object = C;
  using Parameter = void;
};
template <class C, class R, class P>
struct Signature<R (C::*)(P)> {
  using Object = C;
  using Parameter = P;
};

template <class Object>
Object& object_of(const Call& call) {
  if constexpr (std::is_same_v<Object, vm::Vm>)
    return *call.vm;
  else
    return *call.vcpu;
}

template <class Object>
constexpr FdKind fd_of = std::is_same_v<Object, vm::Vm> ? FdKind::vm : FdKind::vcpu;

}  // namespace detail

/// A method without an argument.
template <u32 number, auto method>
consteval Ioctl plain(std::string_view name, std::string_view capability) {
  using Object = typename detail::Signature<decltype(method)>::Object;
  return {number, name, detail::fd_of<Object>, Argument::none, "", 0, capability, [](const Call& call) -> long {
            return (detail::object_of<Object>(call).*method)();
          }};
}

/// A method that takes the argument itself, cut to its parameter's width as the kernel cuts it.
template <u32 number, auto method>
consteval Ioctl by_value(std::string_view name, std::string_view capability) {
  using Signature = detail::Signature<decltype(method)>;
  using Object = typename Signature::Object;
  using T = typename Signature::Parameter;
  static_assert(std::is_integral_v<T>);
  return {number,
          name,
          detail::fd_of<Object>,
          Argument::value,
          sizeof(T) == 4 ? "u32" : "u64",
          sizeof(T),
          capability,
          [](const Call& call) -> long { return (detail::object_of<Object>(call).*method)(static_cast<T>(call.arg)); }};
}

/// A method that takes a structure. By value or const reference: it is copied in. By reference: it is copied out, and
/// in before when the number says that the kernel reads it.
template <u32 number, auto method>
consteval Ioctl by_pointer(std::string_view name, std::string_view capability) {
  using Signature = detail::Signature<decltype(method)>;
  using Object = typename Signature::Object;
  using Parameter = typename Signature::Parameter;
  using T = std::remove_cvref_t<Parameter>;
  constexpr bool writes = std::is_lvalue_reference_v<Parameter> && !std::is_const_v<std::remove_reference_t<Parameter>>;
  constexpr bool reads = !writes || (_IOC_DIR(number) & _IOC_WRITE);
  // KVM_REINJECT_CONTROL and its like do not say their size.
  static_assert(_IOC_SIZE(number) == sizeof(T) || number == _IO(KVMIO, _IOC_NR(number)),
                "the ioctl's number is for another structure");
  return {number,
          name,
          detail::fd_of<Object>,
          !writes  ? Argument::in
          : !reads ? Argument::out
                   : Argument::in_out,
          type_name<T>(),
          sizeof(T),
          capability,
          [](const Call& call) -> long {
            T argument{};
            if (reads && !os::get_user(argument, call.arg)) return -EFAULT;
            const int result = (detail::object_of<Object>(call).*method)(argument);
            if (result < 0) return result;
            if (writes && !os::put_user(call.arg, argument)) return -EFAULT;
            return result;
          }};
}

}  // namespace anykvm::abi
