// Moments of 8 bits, block_codes.py's: a block is an origin, a float that is a power of two, and a code an element.
#pragma once

#include "blocks.h"

namespace {

constexpr int ORIGIN_BYTES = 4, CODED_BLOCK = ORIGIN_BYTES + BLOCK;
constexpr int FRACTION_BITS = 4, SHIFT = 23 - FRACTION_BITS;
constexpr int32_t LOWEST = 32, INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fc00000, NO_SIGN = 0x7fffffff;

constexpr int32_t largest_code(bool is_signed) { return is_signed ? 0x7f : 0xff; }

// random_bits: a hash of a first moment and `salt`, the step.
template <typename T>
INLINE typename Wide<T>::Bits random_bits(typename Wide<T>::Floats moment, uint32_t salt) {
  typedef typename Wide<T>::Bits Bits;
  Bits hashed = ((Bits)moment ^ salt * 0x9e3779b1u) * 0x21f0aaadu;
  hashed = (hashed ^ hashed >> 15) * 0xd35a2d97u;
  return hashed ^ hashed >> 15;
}

// Stores a moment in bfloat16, rounded with the 16 highest of `random`'s 19 bits. Returns it as it reads back.
template <typename T>
INLINE typename Wide<T>::Floats store_bf16_randomly(typename Wide<T>::Floats x, typename Wide<T>::Bits random, void *memory,
                                                    int j) {
  typedef typename Wide<T>::Bits Bits;
  const Bits added = ((Bits)x + (random >> 3)) >> 16;  // infinities stay: their 16 lowest bits are 0
  const Bits rounded = x != x ? Bits{} + 0x7fc0u : added;
  put(packed<T>(rounded), memory, j);
  return (typename Wide<T>::Floats)(rounded << 16);
}

// The larger magnitudes, as bits.
template <typename T>
INLINE typename Wide<T>::Ints larger(typename Wide<T>::Ints top, typename Wide<T>::Floats x) {
  const auto bits = (typename Wide<T>::Ints)x & NO_SIGN;
  return bits > top ? bits : top;
}

// The bits of a block's origin. `top`: the largest magnitude of each lane, as bits.
template <typename T>
INLINE int32_t origin_of(typename Wide<T>::Ints top, bool is_signed) {
  int32_t largest = 0;
  for (int i = 0; i < Wide<T>::LANES; i++) largest = top[i] > largest ? top[i] : largest;
  const int32_t rounded_up = int32_t((uint32_t(largest) + (1 << SHIFT) - 1) >> 23);
  const int32_t exponent = rounded_up - (largest_code(is_signed) >> FRACTION_BITS);
  return largest >= INFINITE ? NOT_A_NUMBER : (exponent < LOWEST ? LOWEST : exponent) << 23;
}

INLINE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Vector `j` of a coded block.
template <typename T, bool SIGNED>
INLINE typename Wide<T>::V decoded(const char *block, int j) {
  typedef typename Wide<T>::Floats Floats;
  typedef typename Wide<T>::Ints Ints;
  typedef typename Wide<T>::Bits Bits;
  int32_t origin;
  std::memcpy(&origin, block, sizeof(origin));
  const Bits byte = load_bytes<T>(block + ORIGIN_BYTES, j), code = SIGNED ? byte & 0x7fu : byte;
  const Floats at_e = (Floats)((code << SHIFT) + uint32_t(origin));
  const Ints missing = (Ints)(2 * float_of(origin) - at_e);
  Floats x = at_e - (Floats)(missing > 0 ? missing : Ints{});
  if (SIGNED) x = (Floats)((Bits)x | (byte << 24 & 0x80000000u));
  return __builtin_convertvector(x, typename Wide<T>::V);
}

// Stores vector `j` of a block whose origin is stored. Returns it as it reads back. `random`: below 2¹⁹. Where the origin
// is a nan, x is.
template <typename T, bool SIGNED>
INLINE typename Wide<T>::Floats encoded(typename Wide<T>::Floats x, typename Wide<T>::Bits random, int32_t origin, char *block, int j) {
  typedef typename Wide<T>::Floats Floats;
  typedef typename Wide<T>::Ints Ints;
  typedef typename Wide<T>::Bits Bits;
  const Floats number = (Floats)((Bits)x & uint32_t(NO_SIGN)), least = Floats{} + 2 * float_of(origin);
  const Ints below = number < least, raised = below & (Ints)least;
  // As if e were at least 1, with an implicit 1 before the fraction: its highest bits are the code.
  Ints bits = (Ints)(number + (Floats)raised) + (Ints)random;
  if (!SIGNED) {
    const Ints lowest = (raised + (1 << SHIFT)) & (Ints)(number > Floats{}) & below;
    bits = bits > lowest ? bits : lowest;
  }
  const Ints code = (bits >> SHIFT) - (below ? Ints{} + ((origin >> SHIFT) + (1 << FRACTION_BITS)) : Ints{} + (origin >> SHIFT));
  const Floats rounded = (Floats)(bits & -(1 << SHIFT)) - (Floats)raised;
  const Bits sign = SIGNED ? (Bits)x & (Bits)(code > Ints{}) & 0x80000000u : Bits{};  // no -0
  store_bytes<T>((Bits)code | sign >> 24, block + ORIGIN_BYTES, j);
  return (Floats)((Bits)rounded | sign);
}

}  // namespace
