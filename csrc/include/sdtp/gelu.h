// Exact (erf) GELU in float32, free of branches and calls so that compilers vectorise it.
#pragma once

#include <cmath>
#include <cstdint>

#include "sdtp/floats.h"
#include "sdtp/portable.h"

namespace sdtp {

// 2^-t for 0 <= t < 126 (other t give some finite number, NaN gives NaN), relative error < 1.3e-7.
SDTP_HOST_DEVICE inline float exp2_negative(float t) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const float shifted = t + kRound;
    const float r = (shifted - kRound) - t;  // in [-1/2, 1/2]
    // Minimax fit of 2^r, relative error 1.9e-9.
    float p = 0.000153458118f;
    p = p * r + 0.00133999312f;
    p = p * r + 0.00961848896f;
    p = p * r + 0.0555032878f;
    p = p * r + 0.240226469f;
    p = p * r + 0.693147206f;
    p = p * r + 1.0f;
    return p * from_bits(0x3f800000u - (to_bits(shifted) << 23));
}

// x * Phi(x), within 1.1e-7 |x| (every float with 3e-8 < |x| < 8 was tried). The polynomial is a minimax fit of
// -log2(erfc(x / sqrt(2))) / x, weighted for the absolute error of erfc: 1.6e-8 exactly, about 1e-7 in float32.
SDTP_HOST_DEVICE inline float gelu(float x) {
    const float a = std::fabs(x);
    float q = 2.83491261e-06f;
    q = q * a - 3.93776889e-05f;
    q = q * a + 0.00018618023f;
    q = q * a + 0.000136936395f;
    q = q * a - 0.00706342016f;
    q = q * a + 0.0524961784f;
    q = q * a + 0.459208197f;
    q = q * a + 1.15110521f;
    // Beyond 4 sqrt(2) half of erfc is below 8e-9 and the fit ends. NaN fails the comparison and stays NaN.
    const float tail = a >= 5.65685425f ? 0.0f : 0.5f * exp2_negative(a * q);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace sdtp
