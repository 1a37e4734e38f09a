// One call: scratch, a team of threads, and the steps one after the other.

#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

#include "chosen.h"
#include "rarefy.h"

namespace {

using rarefy::Algorithm;
using rarefy::Job;

constexpr std::size_t alignment = 64;
constexpr std::int64_t alone = 1 << 14;  // multiply-adds below which a second thread costs more than it brings

// GNU's OpenMP keeps its threads in a pool that a fork does not copy: a child that used it would wait for ever.
#if defined(__unix__) || defined(__APPLE__)
bool used_threads = false;
bool lost_threads = false;
void after_fork() { lost_threads = used_threads; }
const int registered = pthread_atfork(nullptr, nullptr, after_fork);
#endif

int team_size(int threads, std::int64_t work) {
#if defined(_OPENMP)
    if (threads <= 1 || work < alone || omp_in_parallel()) return 1;
#if defined(__unix__) || defined(__APPLE__)
    if (registered != 0 || lost_threads) return 1;
    used_threads = true;
#endif
    return threads;
#else
    (void)threads;
    (void)work;
    return 1;
#endif
}

class Scratch {
  public:
    explicit Scratch(std::size_t bytes)
        : memory_(bytes > 0 ? std::malloc(bytes + alignment) : nullptr), wanted_(bytes > 0) {}
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool failed() const { return wanted_ && memory_ == nullptr; }
    unsigned char* get() const {
        const auto at = reinterpret_cast<std::uintptr_t>(memory_);
        return reinterpret_cast<unsigned char*>((at + alignment - 1) / alignment * alignment);
    }

  private:
    void* memory_;
    bool wanted_;
};

std::size_t rounded(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

const Algorithm* find(int form, int dtype, int algorithm) {
    if (dtype < 0 || dtype >= rarefy::dtypes) return nullptr;
    const rarefy::Kernels& k = rarefy::chosen_kernels();
    const Algorithm* const families[RAREFY_FORMS][RAREFY_ALGORITHMS] = {
        {k.dense_few, k.dense_many, nullptr},
        {k.bitmap_few, k.bitmap_many, k.bitmap_expand},
        {k.index_few, k.index_many, nullptr},
        {k.lut_product, k.lut_product, nullptr},
    };
    if (form < 0 || form >= RAREFY_FORMS || algorithm < 0 || algorithm >= RAREFY_ALGORITHMS) return nullptr;
    const Algorithm* const family = families[form][algorithm];
    return family == nullptr || family[dtype].run == nullptr ? nullptr : &family[dtype];
}

int bucket(std::int64_t tokens) { return tokens < 2 ? 0 : tokens < 8 ? 1 : tokens < 32 ? 2 : tokens < 128 ? 3 : 4; }

// A step with everything that a team needs to run it.
struct Ready {
    const Algorithm* algorithm;  // null: elementwise
    Job job;
    std::int64_t counters[rarefy::job_counters];
};

// The slots of a call with memory given to those that have none: feature-major for 8 tokens and more.
int fill_slots(std::vector<rarefy_slot>& slots, std::int64_t tokens, std::size_t& bytes) {
    for (rarefy_slot& slot : slots) {
        if (slot.data != nullptr) continue;
        slot.token = tokens < 8 ? slot.features : 1;
        slot.feature = tokens < 8 ? 1 : tokens;
        slot.reserved = 1;
        bytes += rounded(static_cast<std::size_t>(tokens * slot.features) * (slot.dtype == RAREFY_BF16 ? 2 : 4));
    }
    return RAREFY_OK;
}

}  // namespace

int rarefy_runs(int32_t form, int32_t dtype, int32_t algorithm) { return find(form, dtype, algorithm) != nullptr; }

int rarefy_run(const rarefy_step* steps, int32_t n_steps, const rarefy_slot* given, int32_t n_slots, int64_t tokens,
               int32_t threads) {
    if (tokens <= 0 || n_steps <= 0) return RAREFY_OK;
    std::vector<rarefy_slot> slots(given, given + n_slots);
    std::vector<Ready> ready(static_cast<std::size_t>(n_steps));
    std::size_t between = 0, scratch = 0;
    fill_slots(slots, tokens, between);
    const int b = bucket(tokens);
    std::int64_t work = 0;
    for (int i = 0; i < n_steps; ++i)
        if (steps[i].operation == RAREFY_LINEAR && steps[i].weights[b] != nullptr)
            work += (steps[i].weights[b]->units * steps[i].weights[b]->block) * tokens;
    const int team = team_size(threads, work);
    for (int i = 0; i < n_steps; ++i) {
        const rarefy_step& step = steps[i];
        Ready& r = ready[static_cast<std::size_t>(i)];
        std::memset(r.counters, 0, sizeof r.counters);
        const auto slot = [&](int32_t at) { return at < 0 ? nullptr : &slots[static_cast<std::size_t>(at)]; };
        r.algorithm = nullptr;
        r.job = {step.weights[b], step.bias, step.activation, slot(step.x), slot(step.other), slot(step.y),
                 tokens, nullptr, r.counters};
        if (step.operation != RAREFY_LINEAR) continue;
        if (r.job.weight == nullptr) return RAREFY_UNSUPPORTED;
        r.algorithm = find(r.job.weight->form, r.job.weight->dtype, step.algorithm[b]);
        if (r.algorithm == nullptr) return RAREFY_UNSUPPORTED;
        const std::size_t bytes = r.algorithm->scratch != nullptr ? r.algorithm->scratch(r.job, team) : 0;
        if (bytes == std::numeric_limits<std::size_t>::max()) return RAREFY_UNSUPPORTED;
        if (bytes > scratch) scratch = bytes;
    }
    const Scratch memory(between + rounded(scratch));
    if (memory.failed()) return RAREFY_NO_MEMORY;
    unsigned char* at = memory.get();
    for (Ready& r : ready) r.job.scratch = at;
    at += rounded(scratch);
    for (rarefy_slot& slot : slots) {
        if (slot.data != nullptr) continue;
        slot.data = at;
        at += rounded(static_cast<std::size_t>(tokens * slot.features) * (slot.dtype == RAREFY_BF16 ? 2 : 4));
    }
    const auto elementwise = rarefy::chosen_kernels().elementwise;
    const auto run = [&](int thread, int size) {
        for (int i = 0; i < n_steps; ++i) {
            const Ready& r = ready[static_cast<std::size_t>(i)];
            if (r.algorithm != nullptr)
                r.algorithm->run(r.job, thread, size);
            else
                elementwise(steps[i], r.job.x, r.job.other, r.job.y, tokens, thread, size);
#if defined(_OPENMP)
            if (size > 1 && i + 1 < n_steps) {
#pragma omp barrier
            }
#endif
        }
    };
#if defined(_OPENMP)
    if (team > 1) {
#pragma omp parallel num_threads(team)
        run(omp_get_thread_num(), omp_get_num_threads());
        return RAREFY_OK;
    }
#endif
    run(0, 1);
    return RAREFY_OK;
}

size_t rarefy_lut_bytes(const rarefy_weight* weight) { return rarefy::chosen_kernels().lut->bytes(weight); }

int rarefy_lut_build(const rarefy_weight* weight, void* bytes, rarefy_weight* lut) {
    return rarefy::chosen_kernels().lut->build(weight, bytes, lut);
}

int rarefy_lut_decode(const rarefy_weight* lut, uint32_t* starts, uint64_t* words, void* values, rarefy_weight* bitmap) {
    return rarefy::chosen_kernels().lut->decode(lut, starts, words, values, bitmap);
}

int rarefy_lut_check(const rarefy_weight* lut, int64_t steps) {
    return rarefy::chosen_kernels().lut->check(lut, steps);
}

namespace {

// A convolution or a training product: one job, one team. With dynamic teams off, a team may still be smaller than asked
// for: kernels take the size that they are given.
template <typename Kernel, typename Job>
int run_alone(const Kernel& kernel, Job& job, std::int64_t work, int threads) {
    if (kernel.run == nullptr) return RAREFY_UNSUPPORTED;
    std::int64_t counters[rarefy::job_counters] = {};
    job.counters = counters;
    const int team = team_size(threads, work);
    const std::size_t bytes = kernel.scratch != nullptr ? kernel.scratch(job, team) : 0;
    if (bytes == std::numeric_limits<std::size_t>::max()) return RAREFY_UNSUPPORTED;
    const Scratch memory(bytes);
    if (memory.failed()) return RAREFY_NO_MEMORY;
    job.scratch = memory.get();
#if defined(_OPENMP)
    if (team > 1) {
#pragma omp parallel num_threads(team)
        kernel.run(job, omp_get_thread_num(), omp_get_num_threads());
        return RAREFY_OK;
    }
#endif
    kernel.run(job, 0, 1);
    return RAREFY_OK;
}

}  // namespace

int rarefy_conv(const rarefy_conv2d* conv, const void* x, const void* other, void* y, int64_t images, int32_t threads) {
    if (images <= 0) return RAREFY_OK;
    const int dtype = conv->weight->dtype;
    if (dtype < 0 || dtype >= rarefy::dtypes) return RAREFY_UNSUPPORTED;
    rarefy::ConvJob job = {conv, x, other, y, images, nullptr, nullptr};
    const std::int64_t pixels = static_cast<std::int64_t>(conv->height / conv->stride_h) * (conv->width / conv->stride_w);
    return run_alone(rarefy::chosen_kernels().conv[dtype], job, conv->weight->units * conv->weight->block * pixels * images,
                     threads);
}

int rarefy_train_forward(const float* values, const uint16_t* columns, const uint32_t* starts, int64_t rows, int64_t cols,
                         const float* x, int64_t x_token, int64_t x_feature, float* y, int64_t y_token,
                         int64_t y_feature, const float* bias, int64_t tokens, int32_t threads) {
    rarefy::TrainJob job = {values, columns, starts,    rows, cols,    x,      x_token, x_feature, y,
                            nullptr, y_token, y_feature, bias, nullptr, tokens, nullptr, nullptr};
    return run_alone(*rarefy::chosen_kernels().train_forward, job, static_cast<std::int64_t>(starts[rows]) * tokens, threads);
}

int rarefy_train_weight_gradient(const uint16_t* columns, const uint32_t* starts, int64_t rows, int64_t cols,
                                 const float* x, int64_t x_token, int64_t x_feature, const float* dy, int64_t dy_token,
                                 int64_t dy_feature, float* gradient, int64_t tokens, int32_t threads) {
    rarefy::TrainJob job = {nullptr, columns, starts,     rows,    cols,     x,      x_token, x_feature, nullptr,
                            dy,      dy_token, dy_feature, nullptr, gradient, tokens, nullptr, nullptr};
    return run_alone(*rarefy::chosen_kernels().train_weight_gradient, job, static_cast<std::int64_t>(starts[rows]) * tokens,
                     threads);
}

int rarefy_train_gather(const float* values, const uint32_t* order, float* out, int64_t n, int32_t threads) {
    const int team = team_size(threads, n);
    (void)team;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(team) schedule(static)
#endif
    for (std::int64_t i = 0; i < n; ++i) out[i] = values[order[i]];
    return RAREFY_OK;
}
