// Which variants this machine can run, and the lookup of a kernel by name.
#include "library.h"

#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct Variant {
  const char* name;
  bool usable;
  const Entry* (*entries)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports checks CPUID, and that the operating system saves the registers.
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
// AVX-VNNI, bit 4 of EAX in leaf 7's subleaf 1, is not AVX512_VNNI: client CPUs have it without AVX-512.
[[maybe_unused]] bool has_avxvnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#if !defined(QVL_NO_AMX)
// Bits 22, 24 and 25 of EDX in leaf 7: products of bfloat16 on tiles, tiles, and products of int8; bit 5 of EAX in its
// subleaf 1: bfloat16 in registers. gcc 12's cpu_supports does not know the first three names.
bool has_amx() {
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 13) == 13;
  return tiles && has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) && entries_amx();
}
#endif
#endif

#if defined(__aarch64__)
// Features as Linux names them in the auxiliary vector (arch/arm64/include/uapi/asm/hwcap.h), or macOS as settings.
// Elsewhere (Windows) they are not asked for, and NEON runs.
[[maybe_unused]] bool has_arm([[maybe_unused]] int word, [[maybe_unused]] int bit, [[maybe_unused]] const char* setting) {
#if defined(__linux__)
  return getauxval(word == 2 ? AT_HWCAP2 : AT_HWCAP) >> bit & 1;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(setting, &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}
[[maybe_unused]] bool has_dotprod() { return has_arm(1, 20, "hw.optional.arm.FEAT_DotProd"); }
[[maybe_unused]] bool has_i8mm() {
  return has_dotprod() && has_arm(2, 13, "hw.optional.arm.FEAT_I8MM") && has_arm(2, 14, "hw.optional.arm.FEAT_BF16");
}
#endif

const Variant* variants() {
  static const Variant all[] = {
#if defined(__x86_64__)
#if !defined(QVL_NO_AMX)
      {"amx", has_amx(), entries_amx},
#endif
#if !defined(QVL_NO_AVX512)
      {"avx512", has_avx512(), entries_avx512},
#endif
#if !defined(QVL_NO_AVXVNNI)
      {"avxvnni", has_avxvnni(), entries_avxvnni},
#endif
#if !defined(QVL_NO_AVX2)
      {"avx2", has_avx2(), entries_avx2},
#endif
#elif defined(__aarch64__)
#if !defined(QVL_NO_I8MM)
      {"i8mm", has_i8mm(), entries_i8mm},
#endif
#if !defined(QVL_NO_DOTPROD)
      {"dotprod", has_dotprod(), entries_dotprod},
#endif
#if !defined(QVL_NO_NEON)
      {"neon", true, entries_neon},
#endif
#endif
      {"portable", true, entries_portable},
      {nullptr, false, nullptr},
  };
  return all;
}

const Entry* find(const Entry* entry, const char* name) {
  for (; entry->name; entry++)
    if (!std::strcmp(entry->name, name)) return entry;
  return nullptr;
}

}  // namespace

extern "C" const char* qvl_instruction_sets(void) {
  static const std::string names = [] {
    std::string found;
    for (const Variant* v = variants(); v->name; v++)
      if (v->usable) found += (found.empty() ? "" : " ") + std::string(v->name);
    return found;
  }();
  return names.c_str();
}

extern "C" int64_t qvl_abi(void) { return kAbi; }

extern "C" int64_t qvl_checked(void) {
#if defined(QVL_CHECKED)
  return 1;
#else
  return 0;
#endif
}

extern "C" const Entry* qvl_entry(const char* instruction_set, const char* name) {
  const Entry* found = find(entries_pack(), name);
  if (!found) found = find(entries_embed(), name);
  for (const Variant* v = variants(); v->name && !found; v++)
    if (v->usable && !std::strcmp(v->name, instruction_set)) found = find(v->entries(), name);
  return found;
}

extern "C" void* qvl_kernel(const char* instruction_set, const char* name, const char** arguments) {
  const Entry* found = qvl_entry(instruction_set, name);
  if (found && arguments) *arguments = found->arguments;
  return found ? found->function : nullptr;
}
