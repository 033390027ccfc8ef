// Moments of 8 bits, block_codes.py's: a block is an origin, a float that is a power of two, and a code an element.
#pragma once

#include "blocks.h"

namespace {

constexpr int ORIGIN_BYTES = 4, CODED_BLOCK = ORIGIN_BYTES + BLOCK;
constexpr int FRACTION_BITS = 4, SHIFT = 23 - FRACTION_BITS, RANDOM_BITS = 16;
constexpr int32_t LOWEST = 32, INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fc00000, NO_SIGN = 0x7fffffff;

constexpr int32_t largest_code(bool is_signed) { return is_signed ? 0x7f : 0xff; }

// random_bits: a hash of a moment, a gradient and `salt`, the step.
template <typename T>
INLINE typename Wide<T>::Bits random_bits(typename Wide<T>::Floats moment, typename Wide<T>::Floats gradient, uint32_t salt) {
  typedef typename Wide<T>::Bits Bits;
  Bits hashed = (Bits)moment * 0x9e3779b1u ^ (Bits)gradient * 0x85ebca77u ^ (Bits{} + salt * 0xc2b2ae3du);
  hashed = (hashed ^ hashed >> 15) * 0x2c1b3c6du;
  hashed = (hashed ^ hashed >> 12) * 0x297a2d39u;
  return hashed ^ hashed >> 15;
}

// The bits of a block's origin. `top`: the largest magnitude of each lane, as bits.
template <typename T>
INLINE int32_t origin_of(typename Wide<T>::Ints top, bool is_signed) {
  int32_t largest = 0;
  for (int i = 0; i < Wide<T>::LANES; i++) largest = top[i] > largest ? top[i] : largest;
  const int32_t exponent = (largest >> 23) - (largest_code(is_signed) >> FRACTION_BITS);
  return largest >= INFINITE ? NOT_A_NUMBER : (exponent < LOWEST ? LOWEST : exponent) << 23;
}

// Codes and signs (the highest bit of each lane) as values.
template <typename T>
INLINE typename Wide<T>::V value_of(typename Wide<T>::Bits code, typename Wide<T>::Bits sign, int32_t origin) {
  typedef typename Wide<T>::Floats Floats;
  typedef typename Wide<T>::Bits Bits;
  float scale;
  std::memcpy(&scale, &origin, sizeof(scale));
  const Floats at_e = (Floats)((code << SHIFT) + uint32_t(origin)), missing = (Floats{} + (scale + scale)) - at_e;
  const Floats magnitude = at_e - (missing > Floats{} ? missing : Floats{});
  return __builtin_convertvector((Floats)((Bits)magnitude | sign), typename Wide<T>::V);
}

// Vector `j` of a coded block.
template <typename T, bool SIGNED>
INLINE typename Wide<T>::V decoded(const char *block, int j) {
  int32_t origin;
  std::memcpy(&origin, block, sizeof(origin));
  const typename Wide<T>::Bits byte = load_bytes<T>(block + ORIGIN_BYTES, j);
  return value_of<T>(byte & uint32_t(largest_code(SIGNED)), SIGNED ? (byte & 0x80u) << 24 : byte ^ byte, origin);
}

// Stores vector `j` of a block whose origin is stored. Returns it as it reads back. `random`: of 16 bits.
template <typename T, bool SIGNED>
INLINE typename Wide<T>::V encoded(typename Wide<T>::Floats x, typename Wide<T>::Bits random, int32_t origin, char *block, int j) {
  typedef typename Wide<T>::Floats Floats;
  typedef typename Wide<T>::Ints Ints;
  typedef typename Wide<T>::Bits Bits;
  float scale;
  std::memcpy(&scale, &origin, sizeof(scale));
  const Floats number = (Floats)((Bits)x & uint32_t(NO_SIGN)), least = Floats{} + (scale + scale);
  const Ints below = number < least;
  const Ints shifted = (Ints)(number + (Floats)(below & (Ints)least));
  Ints code = ((shifted + (Ints)(random << (SHIFT - RANDOM_BITS))) >> SHIFT) - (origin >> SHIFT) + (below & -(1 << FRACTION_BITS));
  const Ints largest = Ints{} + largest_code(SIGNED);
  code = code > largest ? largest : code;
  if (!SIGNED) {
    const Ints least_code = -(number > Floats{});
    code = code > least_code ? code : least_code;
  }
  if (origin == NOT_A_NUMBER) code = Ints{};
  const Bits sign = SIGNED ? (Bits)x & (Bits)(code > Ints{}) & 0x80000000u : Bits{};  // no -0
  store_bytes<T>((Bits)code | sign >> 24, block + ORIGIN_BYTES, j);
  return value_of<T>((Bits)code, sign, origin);
}

}  // namespace
