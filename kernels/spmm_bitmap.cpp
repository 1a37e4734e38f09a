#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm spmm_bitmap[dtypes];
const Algorithm spmm_bitmap[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
