#include "isas.h"

#include <stdexcept>

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tersekv {

#define HAVE(ISA) namespace ISA { extern const Kernels kernels; }
HAVE(portable)
#if defined(TERSEKV_PORTABLE)
#elif defined(__x86_64__)
HAVE(amx) HAVE(avx512) HAVE(avxvnni) HAVE(avx2)
#elif defined(__aarch64__)
HAVE(neon)
#endif
#undef HAVE

namespace {

#if defined(TERSEKV_PORTABLE)
#elif defined(__x86_64__)
// AVX-VNNI on 256-bit registers: leaf 7, subleaf 1, eax bit 4. GCC 12 has no name for it.
bool has_avxvnni() {
  unsigned a = 7, b, c = 1, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 4 & 1;
}

// The matrix unit: leaf 7, edx bits 24 (tiles) and 25 (bytes). Its registers are large, so Linux wants to be asked.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return (d >> 24 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

// The family of an AMD processor: leaf 1, eax, a base of 15 and what is added to it. 25 is Zen 3 and Zen 4, 26 Zen 5.
int family() {
  unsigned a = 1, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return int((a >> 8 & 15) + (a >> 20 & 255));
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & (1ul << 20); }
#elif defined(__aarch64__)
bool has_dotprod() { return true; }  // every 64-bit Apple processor
#endif

std::vector<Choice> find() {
  std::vector<Choice> all;
#if defined(TERSEKV_PORTABLE)
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni");
  all.push_back({&amx::kernels, avx2 && avx512 && has_amx(), "AVX-512 and AMX for bytes, on Linux"});
  all.push_back({&avx512::kernels, avx2 && avx512, "AVX-512 with VBMI, VBMI2 and VNNI"});
  all.push_back({&avxvnni::kernels, avx2 && has_avxvnni(), "AVX2 and AVX-VNNI"});
  all.push_back({&avx2::kernels, avx2, "AVX2, FMA and F16C"});
#elif defined(__aarch64__)
  all.push_back({&neon::kernels, has_dotprod(), "ARMv8.2 with dot products"});
#endif
  all.push_back({&portable::kernels, true, "any processor"});
  return all;
}

}  // namespace

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = find();
  return all;
}

Hints hints() {
#if defined(__x86_64__) && !defined(TERSEKV_PORTABLE)
  static const bool zen5 = (__builtin_cpu_init(), __builtin_cpu_is("amd")) && family() >= 26;
  return {zen5, zen5};
#else
  return {true, false};
#endif
}

const Kernels& choose(const std::string& name) {
  std::string names;
  for (const Choice& choice : choices()) {
    if (choice.runs && (name.empty() || name == choice.kernels->name)) return *choice.kernels;
    if (choice.runs) names += (names.empty() ? "" : ", ") + std::string(choice.kernels->name);
  }
  throw std::invalid_argument("Instruction set \"" + name + "\" does not run here. Allowed: " + names + ".");
}

}  // namespace tersekv
