#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Algorithm gemm_dense[dtypes];
const Algorithm gemm_dense[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

const Algorithm gemm_expand[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
