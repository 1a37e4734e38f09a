#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

const Training train_forward = {nullptr, nullptr};
const Training train_weight_gradient = {nullptr, nullptr};

}  // namespace rarefy::RAREFY_NAMESPACE
