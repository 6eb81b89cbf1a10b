// Which instruction sets can run here, and which is in use. Knows no kernel.
#include <atomic>

#include "kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace shuteye {

KernelTable portable_table();
void add_quant_portable(KernelTable& table);
#if defined(__x86_64__)
KernelTable avx2_table();
KernelTable avx512_table();
KernelTable amx_table();
void add_quant_avx2(KernelTable& table);
void add_quant_avxvnni(KernelTable& table);
void add_quant_avx512(KernelTable& table);
void add_quant_amx(KernelTable& table);
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(__x86_64__) && defined(SHUTEYE_EMULATED)
bool has_avxvnni() { return true; }
bool has_avx512() { return true; }
bool has_amx() { return true; }
bool has_amx_int8() { return true; }
#elif defined(__x86_64__)
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & (1u << 4);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Linux grants tile registers per process, on request (Documentation/arch/x86/xstate.rst).
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool bf16 = edx & (1u << 22), tile = edx & (1u << 24);
  return bf16 && tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_int8() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & (1u << 25);
}
#endif

#if defined(__x86_64__)
bool probe(int64_t level) {
  switch (level) {
    case kPortable: return true;
    case kAvx2: return has_avx2();
    case kAvx512: return has_avx2() && has_avx512();
    case kAmx: return has_avx2() && has_avx512() && has_amx();
    default: return false;
  }
}

KernelTable table_of(int64_t level) {
  switch (level) {
    case kAvx2: return avx2_table();
    case kAvx512: return avx512_table();
    case kAmx: return amx_table();
    default: return portable_table();
  }
}

void add_quant(int64_t level, KernelTable& table) {
  switch (level) {
    case kAvx2: return has_avxvnni() ? add_quant_avxvnni(table) : add_quant_avx2(table);
    case kAvx512: return add_quant_avx512(table);
    case kAmx: return has_amx_int8() ? add_quant_amx(table) : add_quant_avx512(table);
    default: return add_quant_portable(table);
  }
}
#else
bool probe(int64_t level) { return level == kPortable; }
KernelTable table_of(int64_t) { return portable_table(); }
void add_quant(int64_t, KernelTable& table) { add_quant_portable(table); }
#endif

KernelTable make_table(int64_t level) {
  KernelTable table = table_of(level);
  add_quant(level, table);
  return table;
}

struct Levels {
  bool supported[kNumLevels];
  KernelTable tables[kNumLevels];
  std::atomic<int64_t> active{0};

  Levels() {
    for (int64_t level = 0; level < kNumLevels; level++) {
      supported[level] = probe(level);
      if (!supported[level]) continue;
      tables[level] = make_table(level);
      active = level;
    }
  }
};

Levels& levels() {
  static Levels only;
  return only;
}

} // namespace

bool level_supported(int64_t level) { return level >= 0 && level < kNumLevels && levels().supported[level]; }
int64_t active_level() { return levels().active.load(); }
const KernelTable& active_table() { return levels().tables[active_level()]; }

bool select_level(int64_t level) {
  if (!level_supported(level)) return false;
  levels().active.store(level);
  return true;
}

} // namespace shuteye
