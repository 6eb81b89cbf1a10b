// The processor's vector instructions; in a build for tests (build.py), functions of the same names that need AVX2 alone.
#pragma once

#if defined(SHUTEYE_EMULATED)
#include "emulated_intrinsics.h"
#else
#include <immintrin.h>
#endif
