// AVX-512 with VBMI, VBMI2 and VNNI: Ice Lake, Zen 4 and newer.
#pragma once
#include "zmm.h"

namespace tersekv::TERSEKV_ISA {

using Isa = Zmm;

}  // namespace tersekv::TERSEKV_ISA
