// Operations on one block: vectors, conversion of dtypes, sums by halving.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int BLOCK = 256;  // elements; layout.BLOCK

// REMAINDER: int16, the low 16 bits of masters of bfloat16 weights; see remainders.py.
enum Dtype : int64_t { NONE = -1, F32 = 0, BF16 = 1, F16 = 2, F64 = 3, REMAINDER = 4 };

// -- vectors of 64 bytes, on any machine --------------------------------------------------------------

template <typename T>
struct Wide {
  typedef T V __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int LANES = 64 / sizeof(T);
  static constexpr int COUNT = BLOCK / LANES;
};

template <typename T>
INLINE typename Wide<T>::V &at(T *memory, int j) {
  return *reinterpret_cast<typename Wide<T>::V *>(memory + j * Wide<T>::LANES);
}

INLINE Wide<float>::V root(Wide<float>::V x) {
  Wide<float>::V y;
#if defined(__AVX512F__)
  _mm512_storeu_ps((float *)&y, _mm512_sqrt_ps(_mm512_loadu_ps((float *)&x)));
#elif defined(__AVX__)
  for (int i = 0; i < 16; i += 8) _mm256_storeu_ps((float *)&y + i, _mm256_sqrt_ps(_mm256_loadu_ps((float *)&x + i)));
#else
  for (int i = 0; i < 16; i++) y[i] = std::sqrt(x[i]);
#endif
  return y;
}

INLINE Wide<double>::V root(Wide<double>::V x) {
  Wide<double>::V y;
#if defined(__AVX512F__)
  _mm512_storeu_pd((double *)&y, _mm512_sqrt_pd(_mm512_loadu_pd((double *)&x)));
#elif defined(__AVX__)
  for (int i = 0; i < 8; i += 4) _mm256_storeu_pd((double *)&y + i, _mm256_sqrt_pd(_mm256_loadu_pd((double *)&x + i)));
#else
  for (int i = 0; i < 8; i++) y[i] = std::sqrt(x[i]);
#endif
  return y;
}

template <typename T>
struct Pair {
  typename Wide<T>::V weight, update;
  INLINE Pair operator+(const Pair &other) const { return {weight + other.weight, update + other.update}; }
};

template <typename T>
struct Single {
  typename Wide<T>::V value;
  INLINE Single operator+(const Single &other) const { return {value + other.value}; }
};

// The sum of `leaf(j)` over a block's vectors by halving: first half plus second half until one vector is left.
template <int LEAVES, int COUNT, typename Leaf>
INLINE auto by_halving(int j, Leaf &leaf) {
  if constexpr (LEAVES == 1) {
    return leaf(j);
  } else {
    auto first = by_halving<LEAVES / 2, COUNT>(j, leaf);
    return first + by_halving<LEAVES / 2, COUNT>(j + COUNT / LEAVES, leaf);
  }
}

template <typename T>
INLINE T across_lanes(typename Wide<T>::V x) {
  T lanes[Wide<T>::LANES];
  std::memcpy(lanes, &x, sizeof(lanes));
  for (int half = Wide<T>::LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// -- dtypes -------------------------------------------------------------------------------------------

template <typename T>
constexpr int64_t own_dtype() {
  return sizeof(T) == 4 ? F32 : F64;
}

INLINE int64_t size_of(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

INLINE uint16_t to_bf16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <typename T>
void load(int64_t dtype, const char *from, int n, T *to) {
  switch (dtype) {
    case F32:
      for (int i = 0; i < n; i++) to[i] = T(((const float *)from)[i]);
      break;
    case F64:
      for (int i = 0; i < n; i++) to[i] = T(((const double *)from)[i]);
      break;
    case F16:
      for (int i = 0; i < n; i++) to[i] = T(float(((const _Float16 *)from)[i]));
      break;
    default:
      for (int i = 0; i < n; i++) to[i] = T(from_bf16(((const uint16_t *)from)[i]));
  }
  for (int i = n; i < BLOCK; i++) to[i] = T(0);
}

template <typename T>
void store(int64_t dtype, const T *from, int n, char *to) {
  switch (dtype) {
    case F32:
      for (int i = 0; i < n; i++) ((float *)to)[i] = float(from[i]);
      break;
    case F64:
      for (int i = 0; i < n; i++) ((double *)to)[i] = double(from[i]);
      break;
    case F16:
      for (int i = 0; i < n; i++) ((_Float16 *)to)[i] = _Float16(float(from[i]));
      break;
    default:
      for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bf16(float(from[i]));
  }
}

// remainders.joined: for any remainder, the master rounds to the model's weight.
INLINE float joined(uint16_t model, int16_t remainder) {
  const int32_t magnitude = model & 0x7fff;
  const int32_t lowest = magnitude == 0 ? 0 : (model & 1) - 0x8000, highest = magnitude == 0x7f80 ? 0 : 0x7fff;
  int32_t lower = remainder;
  lower = lower < lowest ? lowest : lower;
  lower = lower > highest ? highest : lower;
  const uint32_t bits = (uint32_t(model) << 16) + uint32_t(lower);
  float master;
  std::memcpy(&master, &bits, 4);
  return master;
}

// remainders.split: the master minus `model`, the rounded master, both as bits.
INLINE int16_t remainder_of(float master, uint16_t model) {
  uint32_t bits;
  std::memcpy(&bits, &master, 4);
  const int32_t lower = int32_t(bits - (uint32_t(model) << 16));
  return int16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0 : lower > 0x7fff ? 0x7fff : lower);
}

template <typename T>
void join(const uint16_t *model, const int16_t *remainder, int n, T *to) {
  for (int i = 0; i < n; i++) to[i] = T(joined(model[i], remainder[i]));
  for (int i = n; i < BLOCK; i++) to[i] = T(0);
}

template <typename T>
void split(const T *from, int n, uint16_t *model, int16_t *remainder) {
  for (int i = 0; i < n; i++) {
    const float master = float(from[i]);
    const uint16_t rounded = to_bf16(master);
    model[i] = rounded;
    remainder[i] = remainder_of(master, rounded);
  }
}

// One kind of memory of one block: in place if the block is whole and of the compute dtype, else a copy.
template <typename T>
struct View {
  T *values;
  char *place;
  int64_t dtype;
  int n;
  bool copied;

  INLINE View(char *memory, int64_t dtype, int64_t block, int n, T *scratch)
      : place(memory + block * BLOCK * size_of(dtype)), dtype(dtype), n(n), copied(dtype != own_dtype<T>() || n != BLOCK) {
    values = copied ? scratch : (T *)place;
    if (copied) load(dtype, place, n, scratch);
  }
  // A view of `values` that are already a copy.
  INLINE View(char *place, int64_t dtype, int n, T *values) : values(values), place(place), dtype(dtype), n(n), copied(true) {}
  // Stores a copy; afterwards `values` are as they read back.
  INLINE void write() {
    if (!copied) return;
    store(dtype, values, n, place);
    if (dtype != own_dtype<T>()) load(dtype, place, n, values);
  }
};

// Stores a block with non-temporal writes, so that the cache does not read it first. Returns whether it did.
template <typename T>
INLINE bool stream(const T *from, T *to) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64) return false;
  const char *source = (const char *)from;
  char *target = (char *)to;
  for (size_t i = 0; i < BLOCK * sizeof(T); i += 64)
    _mm512_stream_si512((__m512i *)(target + i), _mm512_loadu_si512(source + i));
  return true;
#else
  return false;
#endif
}

// Makes non-temporal writes visible to other threads.
INLINE void streamed() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace
