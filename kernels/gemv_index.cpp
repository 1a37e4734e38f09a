#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm gemv_index[dtypes];
const Algorithm gemv_index[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
