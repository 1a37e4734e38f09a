#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

const Convolution conv[dtypes] = {{nullptr, nullptr}, {nullptr, nullptr}, {nullptr, nullptr}};

}  // namespace rarefy::RAREFY_NAMESPACE
