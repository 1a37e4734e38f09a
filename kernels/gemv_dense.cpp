#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm gemv_dense[dtypes];
const Algorithm gemv_dense[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
