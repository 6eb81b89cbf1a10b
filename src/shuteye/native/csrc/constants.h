// Loops over numbers that the compiler must know. No std:: templates, whose copies instruction sets would share.
#pragma once

namespace SHUTEYE_ISA {

template <int number>
struct Constant {
  static constexpr int value = number;
};

// body(Constant<0>{}), ... body(Constant<count - 1>{}).
template <int count, int first = 0, class Body>
__attribute__((always_inline)) inline void for_constants(const Body& body) {
  if constexpr (first < count) {
    body(Constant<first>{});
    for_constants<count, first + 1>(body);
  }
}

} // namespace SHUTEYE_ISA
