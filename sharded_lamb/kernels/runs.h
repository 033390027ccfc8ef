// A rank's memory as runs of blocks, and the formats of a block's memory: what is not stored as the compute dtype is
// converted in loops of its own, before and after the arithmetic. A processor overlaps more vectors of short loops.

#pragma once

#include <algorithm>
#include <type_traits>

#include "codes.h"

namespace {

// A contiguous range of memory; blocks start at its first element, and the last one may be short.
struct Run {
  char *weight, *model, *grad, *exp_avg, *exp_avg_sq;  // null: no model, no second moment
  const int64_t *block_param;  // [blocks] the parameter of each block; null: `param` for all
  int64_t numel, param;
  int64_t first_block;  // number of blocks in the runs before
  int64_t weight_dtype, model_dtype, grad_dtype, state_dtype;

  int64_t owner(int64_t block) const { return block_param ? block_param[block] : param; }
};

// Calls function(dtype) with a floating-point dtype, known when compiled.
template <typename Function>
INLINE void with_known(int64_t dtype, Function function) {
  switch (dtype) {
    case F32:
      return function(std::integral_constant<int64_t, F32>());
    case F64:
      return function(std::integral_constant<int64_t, F64>());
    case F16:
      return function(std::integral_constant<int64_t, F16>());
    default:
      return function(std::integral_constant<int64_t, BF16>());
  }
}

INLINE int size_of_block(int64_t numel, int64_t block) {
  const int64_t left = numel - block * BLOCK;
  return left < BLOCK ? int(left) : BLOCK;
}

INLINE int64_t block_bytes(int64_t dtype) { return dtype == CODES ? CODED_BLOCK : BLOCK * size_of(dtype); }

// One kind of a run's memory, and the bytes of its blocks.
struct Kind {
  char *start;
  int64_t dtype, bytes;

  INLINE Kind(char *start, int64_t dtype)
      : start(start), dtype(dtype), bytes(!start ? 0 : dtype == CODES ? CODED_BLOCK : BLOCK * size_of(dtype)) {}
};

struct Kinds {
  Kind weight, model, grad, exp_avg, exp_avg_sq;
  int64_t numel;

  explicit INLINE Kinds(const Run &run)
      : weight(run.weight, run.weight_dtype),
        model(run.model, run.model_dtype),
        grad(run.grad, run.grad_dtype),
        exp_avg(run.exp_avg, run.state_dtype),
        exp_avg_sq(run.exp_avg_sq, run.state_dtype),
        numel(run.numel) {}
};

struct Copy {
  alignas(64) char bytes[BLOCK * 8];
};

// The memory of a block: in place, or a copy of a short one, padded with zeros.
struct Place {
  char *memory, *block;
  int64_t dtype;

  INLINE Place(const Kind &kind, int64_t number)
      : memory(kind.start + number * kind.bytes), block(memory), dtype(kind.dtype) {}
  INLINE Place(const Kind &kind, int64_t number, int n, Copy &copy) : Place(kind, number) {
    if (n < BLOCK) move_to(copy, n);
  }
  INLINE void move_to(Copy &copy, int n) {
    if (dtype == CODES || !memory) return;  // codes are whole blocks
    block = copy.bytes;
    std::memcpy(block, memory, n * size_of(dtype));
    std::memset(block + n * size_of(dtype), 0, (BLOCK - n) * size_of(dtype));
  }
};

// Returns to memory what copies of a block of `n` elements hold.
template <typename... Changed>
INLINE void write_back(int n, const Changed &...changed) {
  if (n == BLOCK) return;
  ((changed.block == changed.memory || std::memcpy(changed.memory, changed.block, n * size_of(changed.dtype))), ...);
}

struct Places {
  Place weight, model, grad, exp_avg, exp_avg_sq;
  const int n;
  Copy copies[5];

  INLINE Places(const Kinds &kinds, int64_t number)
      : weight(kinds.weight, number),
        model(kinds.model, number),
        grad(kinds.grad, number),
        exp_avg(kinds.exp_avg, number),
        exp_avg_sq(kinds.exp_avg_sq, number),
        n(size_of_block(kinds.numel, number)) {
    if (n == BLOCK) return;
    weight.move_to(copies[0], n), model.move_to(copies[1], n), grad.move_to(copies[2], n);
    exp_avg.move_to(copies[3], n), exp_avg_sq.move_to(copies[4], n);
  }
};

// -- values of the compute dtype, in place or in a copy, [BLOCK] --------------------------------------

template <typename T>
INLINE bool in_place(const Place &place) {
  return place.dtype == own_dtype<T>();
}

// Calls visit(j) for every vector of a block.
template <typename T, typename Visit>
INLINE void vectors(Visit visit) {
#pragma GCC unroll 4
  for (int j = 0; j < Wide<T>::COUNT; j++) visit(j);
}

// Puts value(j) of every vector in `to`. Returns `to`.
template <typename T, typename Value>
INLINE T *filled(T *to, Value value) {
  vectors<T>([&](int j) __attribute__((always_inline)) { put(value(j), to, j); });
  return to;
}

template <typename T>
INLINE T *values(const Place &place, T *copy) {
  if (in_place<T>(place)) return (T *)place.block;
  with_known(place.dtype, [&](auto dtype) __attribute__((always_inline)) {
    filled(copy, [&](int j) __attribute__((always_inline)) { return load<T>(dtype, place.block, j); });
  });
  return copy;
}

template <typename T>
INLINE void store_values(const T *values, const Place &place) {
  if ((char *)values == place.block) return;
  with_known(place.dtype, [&](auto dtype) __attribute__((always_inline)) {
    vectors<T>([&](int j) __attribute__((always_inline)) {
      store<T>(dtype, at<T, Wide<T>::LANES>(values, j), place.block, j);
    });
  });
}

// Gradients; zeros if their `scale` is 0, since 0 x nan would be nan.
template <typename T>
INLINE const T *gradients(const Place &place, T scale, T *copy) {
  if (scale != T(0)) return values(place, copy);
  return filled(copy, [](int) __attribute__((always_inline)) { return typename Wide<T>::V{}; });
}

// A moment, `SIGNED`: the first.
template <typename T, bool SIGNED>
INLINE T *moments(const Place &place, T *copy) {
  if (place.dtype != CODES) return values(place, copy);
  return filled(copy, [&](int j) __attribute__((always_inline)) { return decoded<T, SIGNED>(place.block, j); });
}

// Masters: stored as such, or joined from weights and remainders.
template <typename T>
INLINE T *masters(const Places &places, T *copy) {
  if (!is_remainder(places.weight.dtype)) return values(places.weight, copy);
  alignas(64) int16_t clamped[BLOCK];
  clamp_remainders(places.model.block, places.weight.dtype, places.weight.block, clamped);
  return filled(copy, [&](int j) __attribute__((always_inline)) { return joined<T>(places.model.block, clamped, j); });
}

// Stores masters, and the model's weights if masters are separate.
template <typename T>
INLINE void store_masters(const T *masters, const Places &places) {
  const Place &weight = places.weight, &model = places.model;
  if (weight.dtype == REMAINDER) return split(masters, model.block, REMAINDER, weight.block);
  if (weight.dtype == REMAINDER8) return split(masters, model.block, REMAINDER8, weight.block);
  if (model.memory) store_values(masters, model);
  store_values(masters, weight);
}

// Whether each of a block's weights surely is its master's rounding: a tie, a nan or a zero of the other sign may look as
// if the user had written the weight.
template <typename T>
INLINE bool are_roundings(const T *masters, const Place &model) {
  constexpr int LANES = Wide<T>::LANES;
  typename Wide<T>::Mask differs{};
  typename Wide<T>::Bits furthest{};
  with_known(model.dtype, [&](auto dtype) __attribute__((always_inline)) {
    vectors<T>([&](int j) __attribute__((always_inline)) {
      const auto master = at<T, LANES>(masters, j);
      if (dtype == BF16) {  // nearer than half the distance of bfloat16 numbers
        typedef typename Wide<T>::Bits Bits;
        const Bits weight = unpacked<T>(at<uint16_t, LANES>(model.block, j)) << 16;
        const Bits distance = (Bits)__builtin_convertvector(master, typename Wide<T>::Floats) - weight + 0x7fffu;
        furthest = distance > furthest ? distance : furthest;
      } else {
        differs |= rounded<T>(dtype, master) != load<T>(dtype, model.block, j);
      }
    });
  });
  return !any(differs) && !any(furthest > 0xfffeu);
}

// Makes masters of weights that their masters no longer round to, which the user therefore wrote.
template <typename T>
INLINE void resync(T *masters, const Places &places) {
  if (!places.model.memory || is_remainder(places.weight.dtype) || are_roundings(masters, places.model)) return;
  with_known(places.model.dtype, [&](auto dtype) __attribute__((always_inline)) {
    filled(masters, [&](int j) __attribute__((always_inline)) {
      const auto w = at<T, Wide<T>::LANES>(masters, j), model = load<T>(dtype, places.model.block, j);
      return rounded<T>(dtype, w) != model ? model : w;
    });
  });
  store_values(masters, places.weight), values(places.weight, masters);
}

template <typename T>
INLINE uint32_t key_of(T step) {
  const float salt = float(step);
  uint32_t key;
  std::memcpy(&key, &salt, sizeof(key));
  return key;
}

// Stores a moment that `random(j)` rounds, in bfloat16 or codes. Values become what they read back as.
template <typename T, bool SIGNED, typename Random>
INLINE void store_randomly(T *values, const Place &place, Random random) {
  typedef typename Wide<T>::Floats Floats;
  auto single = [&](int j) __attribute__((always_inline)) {
    return __builtin_convertvector(at<T, Wide<T>::LANES>(values, j), Floats);
  };
  auto all = [&](auto store) __attribute__((always_inline)) {
    filled(values, [&](int j) __attribute__((always_inline)) {
      return __builtin_convertvector(store(single(j), random(j), j), typename Wide<T>::V);
    });
  };
  if (place.dtype == BF16) {
    all([&](Floats x, auto bits, int j) __attribute__((always_inline)) { return store_bf16_randomly<T>(x, bits, place.block, j); });
    return;
  }
  typename Wide<T>::Ints top{};
  vectors<T>([&](int j) __attribute__((always_inline)) { top = larger<T>(top, single(j)); });
  const int32_t origin = origin_of<T>(top, SIGNED);
  std::memcpy(place.block, &origin, sizeof(origin));
  if (origin == NOT_A_NUMBER) {  // a nan or an infinity: all values of the block become nan
    std::fill_n(values, BLOCK, T(float_of(NOT_A_NUMBER)));
    std::memset(place.block + ORIGIN_BYTES, 0, BLOCK);
    return;
  }
  all([&](Floats x, auto bits, int j) __attribute__((always_inline)) { return encoded<T, SIGNED>(x, bits, origin, place.block, j); });
}

// Stores new moments, the first or both, that are not in place. They become what they read back as.
template <typename T, bool HAS_V>
INLINE void store_moments(T *m, T *v, const Places &places, T step) {
  if (places.exp_avg.dtype != BF16 && places.exp_avg.dtype != CODES) {
    store_values(m, places.exp_avg), values(places.exp_avg, m);
    if (HAS_V) store_values(v, places.exp_avg_sq), values(places.exp_avg_sq, v);
    return;
  }
  alignas(64) uint32_t random[BLOCK];
  const uint32_t key = key_of(step);
  vectors<T>([&](int j) __attribute__((always_inline)) {
    put(random_bits<T>(__builtin_convertvector(at<T, Wide<T>::LANES>(m, j), typename Wide<T>::Floats), key), random, j);
  });
  auto bits = [&](int j) __attribute__((always_inline)) { return at<uint32_t, Wide<T>::LANES>(random, j); };
  store_randomly<T, true>(m, places.exp_avg, [&](int j) __attribute__((always_inline)) { return bits(j) & 0x7ffffu; });
  if (HAS_V) store_randomly<T, false>(v, places.exp_avg_sq, [&](int j) __attribute__((always_inline)) { return bits(j) >> 13; });
}

}  // namespace
