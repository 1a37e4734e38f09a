// What every instruction set provides. The kernels' sources are compiled once for each, with RAREFY_NAMESPACE its name.
//
// Such a source must not use the standard library's templates or inline functions: the linker keeps one copy of each,
// which may be the one with instructions that this processor lacks. <cstring>'s functions are safe.
#ifndef RAREFY_ISA_H
#define RAREFY_ISA_H

#include <cstddef>
#include <cstdint>

namespace rarefy {

struct Kernels {
    int (*clear)(void* x, const std::int8_t* mask, std::size_t n, int width);
};

namespace baseline {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}

}  // namespace rarefy

#endif
