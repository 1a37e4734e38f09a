// The table of one instruction set.

#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {

extern const Kernels kernels;
const Kernels kernels = {clear,
                         gemv_dense,
                         gemm_dense,
                         gemv_bitmap,
                         spmm_bitmap,
                         gemm_expand,
                         gemv_index,
                         spmm_index,
                         lut_product,
                         &lut,
                         conv,
                         &train_forward,
                         &train_weight_gradient,
                         elementwise};

}  // namespace rarefy::RAREFY_NAMESPACE
