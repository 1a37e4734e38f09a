// The threads of one call: how they share work and wait for one another.
#ifndef RAREFY_TEAM_H
#define RAREFY_TEAM_H

#include <cstdint>

namespace rarefy::RAREFY_NAMESPACE {

// Every thread of the team must come here. A team of one passes.
inline void barrier(int threads) {
    if (threads > 1) {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
}

// The first of the next `n` pieces of work that nobody has taken. Claiming instead of dealing out keeps a thread whose
// core is busy with something else from holding up the others.
inline std::int64_t claim(std::int64_t* counter, std::int64_t n = 1) {
    return __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
