// Compiled once for each instruction set: TERSEKV_ISA names it, TERSEKV_ISA_HEADER is its layer.
#include "kernels.h"

#include TERSEKV_ISA_HEADER

#include "activations.h"
#include "products.h"
#include "run.h"

#define NAME_OF(x) #x
#define NAMED(x) NAME_OF(x)

namespace tersekv::TERSEKV_ISA {

static void attend(const Job& job, Scratch& scratch, Partial out) { Run(job, scratch, out)(); }

extern const Kernels kernels = {NAMED(TERSEKV_ISA), attend, products, norm, gated};

}  // namespace tersekv::TERSEKV_ISA
