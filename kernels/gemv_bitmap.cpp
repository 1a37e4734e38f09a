#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm gemv_bitmap[dtypes];
const Algorithm gemv_bitmap[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
