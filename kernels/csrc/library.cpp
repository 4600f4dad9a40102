// Which variants this machine can run, and the lookup of a kernel by name.
#include "library.h"

#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
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
