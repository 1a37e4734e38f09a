// What a value of a weight is in memory.
#ifndef RAREFY_VALUES_H
#define RAREFY_VALUES_H

#include "rarefy.h"
#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

template <int dtype>
struct Value {
    using type = float;
};
template <>
struct Value<RAREFY_BF16> {
    using type = bf16;
};
template <>
struct Value<RAREFY_I8> {
    using type = std::int8_t;
};
template <int dtype>
using Stored = typename Value<dtype>::type;

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
