// What every instruction set provides. The kernels' sources are compiled once for each, with RAREFY_NAMESPACE its name.
//
// Such a source must not use the standard library's templates or inline functions: the linker keeps one copy of each,
// which may be the one with instructions that this processor lacks. <cstring>'s and <cmath>'s C functions are safe.
#ifndef RAREFY_ISA_H
#define RAREFY_ISA_H

#include <cstddef>
#include <cstdint>

#include "rarefy.h"

namespace rarefy {

// One product y = activation(x W^T + bias) + other, as every thread of the team sees it.
struct Job {
    const rarefy_weight* weight;
    const float* bias;           // or null
    int activation;
    const rarefy_slot* x;        // never without data here
    const rarefy_slot* other;    // or null; token-major or feature-major, not always as y
    const rarefy_slot* y;
    std::int64_t tokens;
    unsigned char* scratch;      // shared by the team, 64-byte aligned, as many bytes as `scratch()` asked for
    std::int64_t* counters;      // shared, `job_counters` of them, 0 at the start: for work that threads claim
};

constexpr int job_counters = 8;

// Runs on every thread of a team of `threads` at once; barriers (team.h) stand between its phases, and the caller puts
// one behind it. The result must not depend on `threads`: each output is summed by one thread in a fixed order.
struct Algorithm {
    std::size_t (*scratch)(const Job& job, int threads);
    void (*run)(const Job& job, int thread, int threads);
};

struct ConvJob {
    const rarefy_conv2d* conv;
    const void* x;
    const void* other;  // or null
    void* y;
    std::int64_t images;
    unsigned char* scratch;
    std::int64_t* counters;
};

struct Convolution {
    std::size_t (*scratch)(const ConvJob& job, int threads);  // SIZE_MAX: no kernel for this one
    void (*run)(const ConvJob& job, int thread, int threads);
};

struct TrainJob {
    const float* values;
    const std::uint16_t* columns;
    const std::uint32_t* starts;
    std::int64_t rows, cols;
    const float* x;
    std::int64_t x_token, x_feature;
    float* y;               // forward: the output; weight_gradient: null
    const float* dy;        // weight_gradient: the output's gradient; forward: null
    std::int64_t y_token, y_feature;  // of y or dy
    const float* bias;
    float* gradient;
    std::int64_t tokens;
    unsigned char* scratch;
    std::int64_t* counters;
};

struct Training {
    std::size_t (*scratch)(const TrainJob& job, int threads);
    void (*run)(const TrainJob& job, int thread, int threads);
};

struct Lut {
    std::size_t (*bytes)(const rarefy_weight* weight);
    int (*build)(const rarefy_weight* weight, void* bytes, rarefy_weight* lut);
    int (*decode)(const rarefy_weight* lut, std::uint32_t* starts, std::uint64_t* words, void* values,
                  rarefy_weight* bitmap);
    int (*check)(const rarefy_weight* lut, std::int64_t steps);  // lut_check.cpp
};

// A family is a table [dtype: F32, BF16, I8]; an entry with run = null does not exist.
constexpr int dtypes = 3;

struct Kernels {
    int (*clear)(void* x, const std::int8_t* mask, std::size_t n, int width);
    const Algorithm* dense_few;     // gemv_dense.cpp
    const Algorithm* dense_many;    // gemm_dense.cpp
    const Algorithm* bitmap_few;    // gemv_bitmap.cpp
    const Algorithm* bitmap_many;   // spmm_bitmap.cpp
    const Algorithm* bitmap_expand; // gemm_dense.cpp
    const Algorithm* index_few;     // gemv_index.cpp, every block size
    const Algorithm* index_many;    // spmm_index.cpp, every block size
    const Algorithm* lut_product;   // lut_product.cpp, any number of tokens
    const Lut* lut;
    const Convolution* conv;        // conv.cpp: one entry per dtype of the weight
    const Training* train_forward;          // train.cpp
    const Training* train_weight_gradient;
    // Elementwise: y = activation(x), activation(x) + other, activation(x) * other; rows of one slot, elementwise.cpp
    void (*elementwise)(const rarefy_step& step, const rarefy_slot* x, const rarefy_slot* other, const rarefy_slot* y,
                        std::int64_t tokens, int thread, int threads);
};

namespace baseline {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}

}  // namespace rarefy

#endif
