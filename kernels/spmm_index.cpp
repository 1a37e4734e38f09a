#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm spmm_index[dtypes];
const Algorithm spmm_index[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
