// Which variants exist here, and the search for a kernel by name.
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
// __builtin_cpu_supports asks CPUID and also whether the system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
// Bits 22, 24 and 25 of EDX in leaf 7: bfloat16 products, tiles, int8 products. gcc 12's cpu_supports does not know these names.
bool has_amx() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 13) == 13 && entries_amx();
}
#endif

const Variant* variants() {
  static const Variant all[] = {
#if defined(__x86_64__)
      {"amx", has_amx(), entries_amx},
      {"avx512", has_avx512(), entries_avx512},
      {"avx2", has_avx2(), entries_avx2},
#endif
      {"portable", true, entries_portable},
      {nullptr, false, nullptr},
  };
  return all;
}

void* find(const Entry* entry, const char* name) {
  for (; entry->name; entry++)
    if (!std::strcmp(entry->name, name)) return entry->function;
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

extern "C" void* qvl_kernel(const char* instruction_set, const char* name) {
  if (void* packing = find(entries_pack(), name)) return packing;
  for (const Variant* v = variants(); v->name; v++)
    if (v->usable && !std::strcmp(v->name, instruction_set)) return find(v->entries(), name);
  return nullptr;
}
