// The one ordering rule of token selection, for every backend: values descend, equal values keep the lower index, NaN
// ranks below every number, -0 equals +0.
#pragma once

#include <cstdint>

#include "sdtp/portable.h"

namespace sdtp {

// Keys of real scores lie strictly between these two: -inf maps to 0x007fffff and +inf to 0xff800000.
inline constexpr uint32_t kNanKey = 0;
inline constexpr uint32_t kForcedKey = 0xffffffffu;

// Maps the bits of a float32 to an unsigned integer of the same order.
SDTP_HOST_DEVICE constexpr uint32_t order_key(uint32_t bits) {
    constexpr uint32_t kSign = 0x80000000u;
    constexpr uint32_t kInfinity = 0x7f800000u;
    const uint32_t magnitude = bits & ~kSign;
    if (magnitude > kInfinity) return kNanKey;
    if (magnitude == 0) return kSign;
    // Negative numbers grow in magnitude as they fall, so all their bits turn over; positive ones move above them.
    return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// The key is read in three digits from the top: 11, 11 and 10 bits, so a histogram stays at 8 KiB.
inline constexpr int kNumDigits = 3;
inline constexpr int kDigitShift[kNumDigits] = {21, 10, 0};
inline constexpr int kDigitBits[kNumDigits] = {11, 11, 10};
inline constexpr int kMaxBins = 1 << 11;

}  // namespace sdtp
