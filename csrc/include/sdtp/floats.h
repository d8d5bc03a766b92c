// 16-bit floats by their bits, which C++17 has no types for, and their exact values.
#pragma once

#include <cstdint>
#include <cstring>

#include "sdtp/portable.h"

namespace sdtp {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

SDTP_HOST_DEVICE SDTP_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

SDTP_HOST_DEVICE SDTP_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

SDTP_HOST_DEVICE SDTP_INLINE float to_float(float value) { return value; }

SDTP_HOST_DEVICE SDTP_INLINE float to_float(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

SDTP_HOST_DEVICE SDTP_INLINE float to_float(Half value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    // Exponent and mantissa move into place, and the product corrects the exponent's bias, subnormals included.
    const uint32_t finite = to_bits(from_bits(magnitude << 13) * 0x1p112f);
    const uint32_t special = 0x7f800000u | magnitude << 13;
    return from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

}  // namespace sdtp
