// Holding zeros in one pass. A mask byte of -1 or 0, sign extended, is a bit mask of the entry's own width: the loop
// has no branch, leaves +0.0 whatever stood there, and runs at the speed of memory once the compiler has vectorised it.
// Not writing blocks that are clear already was tried: 15 instead of 17 us for 300x784 floats, not worth a second path.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// Through memcpy, since the bytes are floats to the caller and need not be aligned; compilers make plain loads of it.
template <typename Entry>
void clear_entries(unsigned char* __restrict x, const std::int8_t* __restrict mask, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        Entry entry;
        std::memcpy(&entry, x + i * sizeof(Entry), sizeof(Entry));
        entry = static_cast<Entry>(entry & static_cast<Entry>(mask[i]));
        std::memcpy(x + i * sizeof(Entry), &entry, sizeof(Entry));
    }
}

}  // namespace

int clear(void* x, const std::int8_t* mask, std::size_t n, int width) {
    auto* const bytes = static_cast<unsigned char*>(x);
    switch (width) {
        case 1: clear_entries<std::int8_t>(bytes, mask, n); return 0;
        case 2: clear_entries<std::int16_t>(bytes, mask, n); return 0;
        case 4: clear_entries<std::int32_t>(bytes, mask, n); return 0;
        case 8: clear_entries<std::int64_t>(bytes, mask, n); return 0;
        default: return 1;
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE
