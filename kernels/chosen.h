// The instruction set in use, for the sources that are compiled once.
#ifndef RAREFY_CHOSEN_H
#define RAREFY_CHOSEN_H

#include "isa.h"

namespace rarefy {

const Kernels& chosen_kernels();

}  // namespace rarefy

#endif
