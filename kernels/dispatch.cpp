// The C interface, and which instruction set it runs on: chosen once, when the library is loaded.

#include <cstdlib>
#include <cstring>

#include "chosen.h"
#include "rarefy.h"

namespace {

// The levels of the x86-64 psABI by those of their features that older compilers can name too; processors with these
// have the rest. v4 is more than the psABI's level: with dot products and expanding loads, so Ice Lake or Zen 4 and
// later; earlier processors with AVX-512 run v3. Whether the operating system saves the wide registers is part of the answer.

#ifdef RAREFY_HAS_v3
bool has_v3() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
}
#endif

#ifdef RAREFY_HAS_v4
bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif

bool always() { return true; }

struct Isa {
    const char* name;
    bool (*runs_here)();
    const rarefy::Kernels* kernels;
};

// Best first.
constexpr Isa isas[] = {
#ifdef RAREFY_HAS_v4
    {"v4", has_v4, &rarefy::v4::kernels},
#endif
#ifdef RAREFY_HAS_v3
    {"v3", has_v3, &rarefy::v3::kernels},
#endif
    {"baseline", always, &rarefy::baseline::kernels},
};

const Isa& choose() {
#if defined(RAREFY_HAS_v3)
    __builtin_cpu_init();
#endif
    const char* const asked = std::getenv("RAREFY_ISA");
    const Isa* best = nullptr;
    for (const Isa& isa : isas) {
        if (!isa.runs_here()) continue;
        if (best == nullptr) best = &isa;
        if (asked != nullptr && std::strcmp(asked, isa.name) == 0) return isa;
    }
    return *best;
}

const Isa& chosen = choose();

}  // namespace

int rarefy_abi_version(void) { return RAREFY_ABI_VERSION; }

const char* rarefy_isa(void) { return chosen.name; }

int rarefy_clear(void* x, const int8_t* mask, size_t n, int width) { return chosen.kernels->clear(x, mask, n, width); }

const rarefy::Kernels& rarefy::chosen_kernels() { return *chosen.kernels; }
