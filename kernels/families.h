// The families of kernels of one instruction set: each is defined in the source that bears its name.
#ifndef RAREFY_FAMILIES_H
#define RAREFY_FAMILIES_H

#include "isa.h"

namespace rarefy::RAREFY_NAMESPACE {

int clear(void* x, const std::int8_t* mask, std::size_t n, int width);

extern const Algorithm gemv_dense[dtypes];
extern const Algorithm gemm_dense[dtypes];
extern const Algorithm gemm_expand[dtypes];
extern const Algorithm gemv_bitmap[dtypes];
extern const Algorithm gemv_index[dtypes];
extern const Algorithm lut_product[dtypes];
extern const Lut lut;
int check_lut(const rarefy_weight* weight, std::int64_t steps);
extern const Algorithm spmm_bitmap[dtypes];
extern const Algorithm spmm_index[dtypes];
extern const Convolution conv[dtypes];
extern const Training train_forward;
extern const Training train_weight_gradient;

void elementwise(const rarefy_step& step, const rarefy_slot* x, const rarefy_slot* other, const rarefy_slot* y,
                 std::int64_t tokens, int thread, int threads);

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
