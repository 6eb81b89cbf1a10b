// Loops over numbers that the compiler must know. No std:: templates, whose copies instruction sets would share.
#pragma once

#define SHUTEYE_INLINED __attribute__((always_inline))
#define SHUTEYE_INLINE inline __attribute__((always_inline)) // where state must stay in registers

namespace SHUTEYE_ISA {

template <int number>
struct Constant {
  static constexpr int value = number;
};

// body(Constant<0>{}), ... body(Constant<count - 1>{}).
template <int count, int first = 0, class Body>
SHUTEYE_INLINE void for_constants(const Body& body) {
  if constexpr (first < count) {
    body(Constant<first>{});
    for_constants<count, first + 1>(body);
  }
}

} // namespace SHUTEYE_ISA
