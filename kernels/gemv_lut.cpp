#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

std::size_t bytes(const rarefy_weight*) { return 0; }
int build(const rarefy_weight*, void*, rarefy_weight*) { return RAREFY_UNSUPPORTED; }

}  // namespace

const Algorithm gemv_lut[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};
const Lut lut = {bytes, build};

}  // namespace rarefy::RAREFY_NAMESPACE
