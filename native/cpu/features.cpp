#include "cpu/features.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fettle {

Features read_features(const X86Words& words) {
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1u) != 0; };
  // A program may use wide registers only where the system saves them when it switches: SSE and AVX state (bits 1 and 2),
  // for 512 bits also the masks and the upper halves (bits 5 to 7).
  const bool wide = (words.saved_state & 0x06) == 0x06, widest = (words.saved_state & 0xe6) == 0xe6;
  const bool fma = bit(words.leaf1_ecx, 12), f16c = bit(words.leaf1_ecx, 29), avx2 = bit(words.leaf7_ebx, 5);
  const bool f = bit(words.leaf7_ebx, 16), dq = bit(words.leaf7_ebx, 17), bw = bit(words.leaf7_ebx, 30);
  const bool vl = bit(words.leaf7_ebx, 31), vnni = bit(words.leaf7_ecx, 11);
  Features found;
  found.avx2 = wide && avx2 && fma && f16c;
  found.avx512_vnni = found.avx2 && widest && f && dq && bw && vl && vnni;
  return found;
}

namespace {

#if defined(__x86_64__)
X86Words ask_processor() {
  X86Words words;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) words.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words.leaf7_ebx = b;
    words.leaf7_ecx = c;
  }
  if ((words.leaf1_ecx >> 27) & 1u) {  // OSXSAVE: xgetbv is there
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words.saved_state = (static_cast<uint64_t>(high) << 32) | low;
  }
  return words;
}
#endif

Features ask() {
#if defined(__x86_64__)
  return read_features(ask_processor());
#else
  Features found;
#if defined(__aarch64__) && defined(__linux__)
  found.neon_dot = ((getauxval(AT_HWCAP) >> 20) & 1u) != 0;  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
  int there = 0;
  size_t size = sizeof there;
  found.neon_dot = sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, nullptr, 0) == 0 && there != 0;
#endif
  return found;
#endif
}

}  // namespace

Features features() {
  static const Features found = ask();  // asking costs microseconds on a virtual machine
  return found;
}

std::vector<std::string> available_instructions() {
  std::vector<std::string> names;
#if defined(FETTLE_HAS_AVX512)
  if (features().avx512_vnni) names.push_back("avx512_vnni");
#endif
#if defined(FETTLE_HAS_AVX2)
  if (features().avx2) names.push_back("avx2");
#endif
#if defined(FETTLE_HAS_NEON)
  if (features().neon_dot) names.push_back("neon_dot");
#endif
#if defined(FETTLE_EMULATE)
  if (features().avx2 && !features().avx512_vnni) names.push_back("avx512_vnni");  // never the first: emulation is slow
#endif
  names.push_back("portable");
  return names;
}

std::string best_instructions() {
  const char* asked = std::getenv("FETTLE_INSTRUCTIONS");
  return asked != nullptr && *asked != '\0' ? asked : available_instructions().front();
}

}  // namespace fettle
